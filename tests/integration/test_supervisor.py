"""The supervisor with small real processes: who is started again, who is not, and that nobody is left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from deploy.local.plan import ReplicaPlan, RunPlan
from deploy.local.supervisor import EXIT_GAVE_UP, EXIT_INTERRUPTED, Deadlines, RestartRules, Supervisor
from shared.messages import Accepted, AnyMessage, ReplicaExited, StopRun, Wanted, WantedRequest

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]
RULES = RestartRules(first_s=0.01, most_s=0.02, attempts=3, lived_s=30.0)
IDLE = "import time\nwhile True: time.sleep(1)"
NOTE = """
import sys, time
from pathlib import Path
here = Path(sys.argv[1])
count = len(list(here.glob("start-*")))
(here / f"start-{count}").touch()
"""


@dataclass
class Scene:
    """A run folder, what the supervisor said, and what it asked the controller."""

    folder: Path
    said: list[str] = field(default_factory=list)
    asked: list[AnyMessage] = field(default_factory=list)
    on_ask: Callable[[AnyMessage], None] = lambda _: None
    wanted: list[str] | None = None
    draining: list[str] = field(default_factory=list)
    why: str = ""

    def process(self, name: str, code: str) -> ReplicaPlan:
        role = name.rpartition("-")[0] or name
        (self.folder / name).mkdir(exist_ok=True)
        return ReplicaPlan(name, role, (sys.executable, "-c", NOTE + code, str(self.folder / name)))

    def starts(self, name: str) -> int:
        return len(list((self.folder / name).glob("start-*")))

    def until(self, condition: str) -> str:
        """Code that ends a stand-in with code 0 once `condition`, an expression over the run folder `run`, holds."""
        return f"run = here.parent\nwhile not ({condition}): time.sleep(0.01)\n"

    def supervisor(self, replicas: Sequence[ReplicaPlan], *, exit_s: float = 5.0, stop_s: float = 10.0) -> Supervisor:
        plans = {plan.replica: plan for plan in replicas}
        controller = plans.pop("controller")

        def ask(_address: str, message: AnyMessage, _timeout_s: float) -> AnyMessage:
            if not isinstance(message, WantedRequest):
                self.asked.append(message)
            self.on_ask(message)
            if isinstance(message, WantedRequest):
                return Wanted(list(plans) if self.wanted is None else self.wanted, self.draining)
            return Accepted("noted")

        deadlines = Deadlines(stop_s=stop_s, exit_s=exit_s)
        plan = RunPlan("tcp://nowhere", controller, plans.__getitem__)
        return Supervisor(self.folder, plan, deadlines, ask=ask, tell=self.said.append, rules=RULES)

    def run(self, *replicas: ReplicaPlan, **deadlines: float) -> int:
        async def bounded() -> int:
            supervisor = self.supervisor(replicas, **deadlines)
            code = await asyncio.wait_for(supervisor.run(), timeout=20)
            self.why = supervisor.why
            return code

        return asyncio.run(bounded())


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


def children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE]


def test_a_run_is_over_when_its_controller_is_done(scene: Scene) -> None:
    code = scene.run(scene.process("controller", ""), scene.process("rollout-0", scene.until("True")))
    assert code == 0
    assert children() == []


def test_replicas_wait_until_the_controller_answers(scene: Scene) -> None:
    def unreachable(message: AnyMessage) -> None:
        raise TimeoutError("nobody there")

    scene.on_ask = unreachable
    assert scene.run(scene.process("controller", "time.sleep(0.3)"), scene.process("policy-0", IDLE)) == 0
    assert scene.starts("policy-0") == 0


@pytest.mark.parametrize(
    "end", ["sys.exit(1)", "sys.exit(4)", "raise RuntimeError", "import os; os.kill(os.getpid(), 9)"]
)
def test_an_unexpected_end_is_answered_with_a_restart_under_the_same_name(scene: Scene, end: str) -> None:
    rollout = scene.process("rollout-0", f"if count < 2: {end}\n{scene.until('False')}")
    controller = scene.process("controller", scene.until("(run / 'rollout-0' / 'start-2').exists()"))
    assert scene.run(controller, rollout, exit_s=0.2) == 0
    assert scene.starts("rollout-0") == 3


def test_the_controller_too_is_started_again(scene: Scene) -> None:
    assert scene.run(scene.process("controller", "if count < 2: sys.exit(1)")) == 0
    assert scene.starts("controller") == 3


def test_a_replica_that_is_done_is_not_started_again(scene: Scene) -> None:
    controller = scene.process("controller", scene.until("(run / 'policy-0' / 'start-1').exists()"))
    rollout = scene.process("rollout-0", "")
    policy = scene.process("policy-0", "time.sleep(0.3)\nif count == 0: sys.exit(1)")
    assert scene.run(controller, rollout, policy) == 0
    assert scene.starts("rollout-0") == 1


@pytest.mark.parametrize("code", [2, 3])
@pytest.mark.parametrize("name", ["controller", "rollout-0"])
def test_a_fatal_code_ends_the_run_and_is_the_runs_own(scene: Scene, code: int, name: str) -> None:
    plans = [scene.process(who, IDLE) for who in ("controller", "policy-0", "rollout-0") if who != name]
    plans.append(scene.process(name, f"print('the disk is on fire'); sys.exit({code})"))
    assert scene.run(*plans, exit_s=0.3) == code
    assert scene.starts(name) == 1
    assert "the disk is on fire" in scene.why
    assert "the disk is on fire" not in "\n".join(scene.said), "it is shown once, at the end"
    assert children() == []


def test_a_replica_that_never_gets_anywhere_is_given_up(scene: Scene) -> None:
    crash = "raise RuntimeError('no such luck')"
    code = scene.run(scene.process("controller", IDLE), scene.process("policy-0", crash), exit_s=0.3)
    assert code == EXIT_GAVE_UP
    assert scene.starts("policy-0") == RULES.attempts + 1
    assert "giving up" in scene.said[-1]
    assert f"ended {RULES.attempts + 1} times in a row" in scene.why
    assert scene.why.endswith("RuntimeError: no such luck")
    assert "Traceback" not in "\n".join([scene.why, *scene.said])
    assert children() == []


def test_restarts_do_not_add_up_while_the_run_makes_progress(scene: Scene) -> None:
    enough = RULES.attempts * 3
    step = "with open(here.parent / 'metrics.jsonl', 'a') as f: f.write('a step\\n')\n"
    rollout = scene.process("rollout-0", step + "sys.exit(1)")
    controller = scene.process("controller", scene.until(f"(run / 'rollout-0' / 'start-{enough}').exists()"))
    assert scene.run(controller, rollout) == 0


def test_a_replica_that_left_is_started_again_while_it_is_wanted(scene: Scene) -> None:
    done = "(run / 'rollout-0' / 'start-1').exists()"
    leaver = scene.process("rollout-0", f"if count == 0: sys.exit(0)\n{scene.until('False')}")
    assert scene.run(scene.process("controller", scene.until(done)), leaver, exit_s=0.2) == 0
    assert scene.starts("rollout-0") == 2


POLITE = "import signal; signal.signal(signal.SIGTERM, lambda *_: (here / 'asked').touch() or sys.exit(0))\n"


def test_what_the_controller_wants_is_started_and_what_it_gives_up_is_asked_to_leave(scene: Scene) -> None:
    scene.wanted = ["rollout-0"]

    def scale(message: AnyMessage) -> None:
        if (scene.folder / "rollout-0" / "start-0").exists():
            scene.wanted = ["rollout-0", "rollout-1"]
        if (scene.folder / "rollout-1" / "start-0").exists():
            scene.wanted = ["rollout-1"]

    scene.on_ask = scale
    controller = scene.process("controller", scene.until("(run / 'rollout-0' / 'asked').exists()") + "time.sleep(1.5)")
    replicas = [scene.process(f"rollout-{number}", POLITE + IDLE) for number in (0, 1)]
    assert scene.run(controller, *replicas, exit_s=0.5) == 0
    assert (scene.starts("rollout-0"), scene.starts("rollout-1")) == (1, 1)


def test_who_is_draining_already_gets_no_signal(scene: Scene) -> None:
    def drain(message: AnyMessage) -> None:
        if (scene.folder / "rollout-0" / "start-0").exists():
            scene.wanted, scene.draining = [], ["rollout-0"]

    scene.on_ask = drain
    leaver = scene.process("rollout-0", POLITE + "time.sleep(2.5)")
    controller = scene.process(
        "controller", scene.until("(run / 'rollout-0' / 'start-0').exists()") + "time.sleep(3.5)"
    )
    assert scene.run(controller, leaver) == 0
    assert not (scene.folder / "rollout-0" / "asked").exists()
    assert scene.starts("rollout-0") == 1


def test_the_controller_hears_at_once_that_a_process_ended(scene: Scene) -> None:
    rollout = scene.process("rollout-0", f"if count == 0: sys.exit(7)\n{scene.until('False')}")
    controller = scene.process("controller", scene.until("(run / 'rollout-0' / 'start-1').exists()"))
    scene.run(controller, rollout, exit_s=0.2)
    told = [message for message in scene.asked if isinstance(message, ReplicaExited)]
    assert [(message.replica, message.code) for message in told] == [("rollout-0", 7)]


def test_a_command_that_cannot_be_started_ends_the_run_with_the_reason(scene: Scene) -> None:
    missing = ReplicaPlan("policy-0", "policy", ("/nowhere/python",))
    assert scene.run(scene.process("controller", IDLE), missing, exit_s=0.3) == EXIT_GAVE_UP
    assert "/nowhere/python" in scene.why


def test_leftovers_are_terminated_and_the_deaf_ones_killed(scene: Scene) -> None:
    deaf = scene.process("rollout-0", f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n{IDLE}")
    controller = scene.process(
        "controller", scene.until("(run / 'rollout-0' / 'start-0').exists()") + "time.sleep(0.1)"
    )
    assert scene.run(controller, deaf, exit_s=0.2) == 0
    assert any("SIGKILL" in line for line in scene.said)
    assert children() == []


def test_what_a_dead_replica_had_started_itself_goes_with_it(scene: Scene) -> None:
    worker = "import subprocess; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    rollout = scene.process("rollout-0", f"{worker}if count == 0: sys.exit(1)\n{scene.until('False')}")
    controller = scene.process(
        "controller", scene.until("(run / 'rollout-0' / 'start-1').exists()") + "time.sleep(0.2)"
    )
    assert scene.run(controller, rollout, exit_s=0.2) == 0
    assert children() == []


def test_the_first_stop_asks_the_controller_and_waits_for_it(scene: Scene) -> None:
    def stop_when_asked(message: AnyMessage) -> None:
        if isinstance(message, StopRun):
            (scene.folder / "stop").touch()

    scene.on_ask = stop_when_asked
    plans = [scene.process("controller", scene.until("(run / 'stop').exists()"))]
    plans.append(scene.process("rollout-0", scene.until("(run / 'stop').exists()")))

    async def interrupted() -> int:
        running = asyncio.create_task(scene.supervisor(plans).run())
        await asyncio.sleep(0.2)
        os.kill(os.getpid(), signal.SIGINT)
        return await asyncio.wait_for(running, timeout=10)

    assert asyncio.run(interrupted()) == EXIT_INTERRUPTED
    assert [type(message) for message in scene.asked] == [StopRun]
    assert not any("SIGTERM" in line for line in scene.said)


def test_a_second_stop_kills_at_once(scene: Scene) -> None:
    deaf = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n{IDLE}"
    plans = [scene.process("controller", deaf), scene.process("rollout-0", deaf)]

    async def interrupted() -> tuple[int, float]:
        running = asyncio.create_task(scene.supervisor(plans, exit_s=60, stop_s=60).run())
        await asyncio.sleep(0.3)
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(0.1)
        began = time.monotonic()
        os.kill(os.getpid(), signal.SIGINT)
        return await asyncio.wait_for(running, timeout=10), time.monotonic() - began

    code, seconds = asyncio.run(interrupted())
    assert code == EXIT_INTERRUPTED
    assert seconds < 2
    assert children() == []


def test_a_stop_that_the_controller_never_answers_ends_all_the_same(scene: Scene) -> None:
    def unreachable(message: AnyMessage) -> None:
        raise TimeoutError("nobody there")

    scene.on_ask = unreachable

    async def interrupted() -> int:
        running = asyncio.create_task(scene.supervisor([scene.process("controller", IDLE)], exit_s=0.5).run())
        await asyncio.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)
        return await asyncio.wait_for(running, timeout=10)

    assert asyncio.run(interrupted()) == EXIT_INTERRUPTED
    assert children() == []


LAUNCH = """
import asyncio, os, sys
from pathlib import Path
from deploy.local.plan import ReplicaPlan, RunPlan
from deploy.local.supervisor import Deadlines, Supervisor
from shared.messages import Wanted
from shared.service import PARENT_VARIABLE
service = "from shared.service import run_service; import time\\n" \\
          "run_service('rollout', lambda arguments: print('up', flush=True) or time.sleep(600) or 0)"
folder = Path(sys.argv[1])
options = ("--recipe", sys.argv[2], "--run-folder", str(folder), "--controller", "tcp://127.0.0.1:1")
def replica(name):
    return ReplicaPlan(name, "rollout", (sys.executable, "-c", service, *options), {PARENT_VARIABLE: str(os.getpid())})
controller = ReplicaPlan("controller", "controller", ("sleep", "60"))
plan = RunPlan("", controller, replica)
ask = lambda *_: Wanted(["rollout-0", "rollout-1"], [])
asyncio.run(Supervisor(folder, plan, Deadlines(1, 1), ask=ask, tell=print).run())
"""


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float = 15.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        time.sleep(0.02)


def test_no_service_outlives_a_supervisor_that_is_killed(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        '[model.build]\n[data.a]\nkind = "jsonl"\npath = "a.jsonl"\n'
        '[sft]\ndataset = "a"\nbatches = 1\nbatch_size = 1\nlr = 1e-3\n'
    )
    command = [sys.executable, "-c", LAUNCH, str(tmp_path), str(recipe)]
    with subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}) as launcher:
        outputs = [tmp_path / "logs" / f"rollout-{index}.out" for index in (0, 1)]
        try:
            wait_for(lambda: all(o.exists() and "up" in o.read_text() for o in outputs), "both services")
            services = [p for p in psutil.Process(launcher.pid).children() if "sleep" not in p.cmdline()]
            assert len(services) == 2
        finally:
            launcher.kill()
    wait_for(
        lambda: not any(s.is_running() and s.status() != psutil.STATUS_ZOMBIE for s in services), "the services' end"
    )
