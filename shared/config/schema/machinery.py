"""[weights], [bus], [timeouts] and [journal]: what carries a run."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from shared.config.schema.base import LIVE, Positive, Seconds, Table


class WeightsTable(Table):
    """[weights]: how weights travel to the engines."""

    backend: Literal["gloo"] = "gloo"
    interface: str = Field("lo", description="network interface that process groups use")
    every: Positive = Field(
        1,
        json_schema_extra=LIVE,
        description="versions that rollouts may be behind before they are sent the newest; max_staleness at most",
    )
    bucket_mb: Positive = Field(64, description="most megabytes in one broadcast")
    fanout: Positive = Field(2, description="transfers that one source serves at a time; receivers serve the next ones")
    slow_s: Seconds = Field(
        10.0, description="a transfer that takes longer no longer counts against its source's fanout"
    )


class BusTable(Table):
    """[bus]: the control plane."""

    bind: str = Field("tcp://127.0.0.1:*", description="controller's address; off loopback is refused without keys")
    keys: str | None = Field(
        None, description="folder of keys ('orrery keys make'); the variable ORRERY_KEYS goes before it"
    )
    heartbeat_s: Seconds = 1.0
    lost_after_s: Seconds = Field(10.0, description="silence after which a replica is lost")
    resend_s: Seconds = Field(1.0, description="an unacknowledged message is sent again after this")
    window: Positive = Field(256, description="unacknowledged messages a sender may have out")
    max_message_mb: Positive = Field(256, description="a larger message is refused")


class TimeoutsTable(Table):
    """[timeouts]: every wait has a name and ends."""

    register_s: Seconds = Field(60.0, description="a service waits for the controller's welcome")
    load_s: Seconds = Field(
        600.0, description="the controller waits for a model to load, and for all replicas of a role to begin with"
    )
    lease_s: Seconds = Field(
        120.0,
        description="the controller waits for a leased group, counted anew when its replica answers an earlier one",
    )
    step_s: Seconds = Field(300.0, description="the controller waits for gradients, and for a commit to be applied")
    checkpoint_s: Seconds = Field(300.0, description="the controller waits for a checkpoint")
    mesh_s: Seconds = Field(20.0, description="members wait for a process group to form")
    transfer_s: Seconds = Field(
        60.0, description="members wait for one operation on a mesh; the controller for a transfer"
    )
    rejoin_s: Seconds = Field(30.0, description="a new term waits for the replicas of the old one")
    stall_s: Seconds = Field(900.0, description="the run fails when nothing at all has happened for so long")
    exit_s: Seconds = Field(20.0, description="a stopping service has this long before it is killed")


class JournalTable(Table):
    """[journal]: the controller's memory."""

    snapshot_every: Positive = Field(5000, description="events between snapshots")
    segment_mb: Positive = Field(64, description="size at which journal and spool segments are rolled")
