"""Figures on their way to TensorBoard, W&B and Prometheus: once, in order, whoever was killed."""

from __future__ import annotations

import socket
import sys
import types
import urllib.request
from pathlib import Path

import pytest

from deploy.metrics import MetricsWriters
from deploy.metrics.follow import Follower
from deploy.metrics.prometheus import PrometheusWriter
from deploy.metrics.tensorboard import TensorBoardWriter
from deploy.readers.evaluations import read_evaluations
from deploy.readers.figures import StepOfVersion, figures
from shared.config import load_recipe
from shared.config.schema import WandbTable
from tests.unit.deploy.runs import RECIPE, line, make_run, write_lines, write_verdict


def events_of(run: Path) -> list[tuple[int, dict[str, float]]]:
    """(step, tag -> value) of every summary event, as TensorBoard's own reader finds them."""
    from tensorboard.backend.event_processing import event_file_loader as loader

    (path,) = (run / "tensorboard").iterdir()
    found = []
    for event in loader.RawEventFileLoader(str(path)).Load():
        event = _parsed(event)
        if event.HasField("summary"):
            found.append((event.step, {value.tag: value.simple_value for value in event.summary.value}))
    return found


def _parsed(raw: bytes):  # type: ignore[no-untyped-def]
    from tensorboard.compat.proto.event_pb2 import Event

    return Event.FromString(raw)


def write_all(run: Path) -> None:
    """What one life of the follower does."""
    writer, follower = TensorBoardWriter(run), Follower(run)
    lines, verdicts = follower.look()
    for number, it in lines:
        writer.line(number, it)
    for number, verdict in verdicts:
        writer.verdict(number, verdict)
    writer.close()


def test_tensorboard_reads_every_step_and_verdict(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    write_all(run)
    found = events_of(run)
    assert [step for step, values in found if "train/reward" in values] == list(range(40))
    assert found[3][1]["train/reward"] == pytest.approx(0.03)
    assert [(step, values["accuracy/sums"]) for step, values in found if "accuracy/sums" in values] == [
        (0, pytest.approx(0.2)),
        (40, pytest.approx(0.7)),
    ]


def test_a_second_supervisor_doubles_no_step(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    write_all(run)
    write_lines(run, [line(40)])
    write_all(run)
    found = events_of(run)
    assert [step for step, values in found if "train/reward" in values] == list(range(41))
    assert sum("accuracy/sums" in values for _, values in found) == 2


def test_a_file_with_a_torn_end_is_replaced(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    write_all(run)
    (path,) = (run / "tensorboard").iterdir()
    path.write_bytes(path.read_bytes()[:-5])
    write_all(run)
    assert [step for step, values in events_of(run) if "train/reward" in values] == list(range(40))


def test_a_new_lineage_tells_tensorboard_that_later_steps_are_void(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    run.mkdir()
    write_lines(run, [line(step) for step in range(6)])
    write_lines(run, [line(step, lineage=2, loss=7.0) for step in range(3, 5)])
    write_all(run)
    accumulator = EventAccumulator(str(run / "tensorboard"))
    accumulator.Reload()
    scalars = [(event.step, event.value) for event in accumulator.Scalars("train/loss")]
    assert [step for step, _ in scalars] == [0, 1, 2, 3, 4]
    assert scalars[-1][1] == 7.0


def test_a_verdict_lies_at_the_step_that_made_its_version(tmp_path: Path) -> None:
    steps = StepOfVersion()
    steps.take([line(step, version=step // 4) for step in range(12)])  # four optimizer steps a version
    for version in (0, 2, 3):
        write_verdict(tmp_path, version, 50, "periodic")
    found = [steps.of(e).step for e in read_evaluations(tmp_path / "eval")]
    assert found == [0, 8, 12]


def test_what_says_where_a_line_is_and_what_is_not_finite_is_no_figure() -> None:
    named = figures(line(3, nan=float("nan"), text="x", flag=True))
    assert "train/loss" in named and "train/reward" in named
    assert not {"train/step", "train/time", "train/nan", "train/text", "train/flag"} & named.keys()


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_prometheus_serves_the_newest_figures_on_loopback(port: int) -> None:
    pytest.importorskip("prometheus_client")
    writer = PrometheusWriter("run-1", "127.0.0.1", port)
    try:
        writer.line(0, line(0))
        writer.line(1, line(7, reward=0.25))
        text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
    finally:
        writer.close()
    assert 'orrery_train_reward{run="run-1"} 0.25' in text
    assert 'orrery_step{run="run-1"} 7.0' in text


def test_a_prometheus_port_in_use_is_told_and_the_rest_goes_on(tmp_path: Path, port: int) -> None:
    pytest.importorskip("prometheus_client")
    run = make_run(tmp_path / "run")
    recipe = load_recipe(run / "config.toml", [f"metrics.prometheus_port={port}"])
    told: list[str] = []
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen(1)
        with MetricsWriters(run, recipe, told.append):
            pass
    assert len(told) == 1 and f"127.0.0.1:{port}" in told[0] and "choose a free port" in told[0]
    assert len([1 for _, values in events_of(run) if "train/reward" in values]) == 40


class FakeWandb:
    """Keeps what it is given, as wandb's module and as its run."""

    def __init__(self) -> None:
        self.named: dict[str, object] = {}
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.finished = 0

    def init(self, **named: object) -> FakeWandb:
        self.named = named
        return self

    def Settings(self, **named: object) -> dict[str, object]:
        return named

    def define_metric(self, *_: object, **__: object) -> None: ...

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    module = types.ModuleType("wandb")
    for name in ("init", "Settings"):
        setattr(module, name, getattr(fake, name))
    monkeypatch.setitem(sys.modules, "wandb", module)
    return fake


def test_wandb_gets_each_line_once_over_two_supervisors(tmp_path: Path, wandb: FakeWandb) -> None:
    from deploy.metrics.wandb import WandbWriter

    for first, last in ((0, 3), (0, 5)):
        writer = WandbWriter(tmp_path, WandbTable(project="p", mode="offline"), {"a": 1})
        for number in range(first, last):
            writer.line(number, line(number))
        writer.close()
    assert [step for step, _ in wandb.logged] == [0, 1, 2, 3, 4]
    assert wandb.finished == 2
    assert (wandb.named["project"], wandb.named["mode"], wandb.named["id"]) == ("p", "offline", tmp_path.name)


def test_wandb_that_is_not_installed_is_told_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    run = make_run(tmp_path / "run")
    (run / "config.toml").write_text(RECIPE + '\n[metrics.wandb]\nproject = "p"\n')
    told: list[str] = []
    with MetricsWriters(run, load_recipe(run / "config.toml"), told.append):
        pass
    assert told == ["W&B gets no figures any more: [metrics.wandb] needs wandb: pip install 'orrery[wandb]'"]
