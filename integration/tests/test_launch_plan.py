"""The pure part of the launcher: which processes, in which order, and what an exit leads to."""

import pytest

from kvmesh.integration.launch_plan import (
    MemberPlan,
    MemberProcess,
    Phase,
    RestartPolicy,
    metrics_port,
    plan_members,
    port_environment,
    stop_order,
)
from kvmesh.services.common.config import (
    GatewayConfig,
    KvCacheConfig,
    MeshConfig,
    TelemetryConfig,
    WorkerConfig,
)

PLAN = MemberPlan("worker-0", "worker", "both")


def test_launch_plan_numbers_workers_over_all_tables():
    config = MeshConfig(
        kvcache=KvCacheConfig(shards=1),
        workers=(WorkerConfig(role="prefill", count=2), WorkerConfig(role="decode")),
    )
    assert [(m.member_id, m.kind, m.role) for m in plan_members(config)] == [
        ("traces", "traces", ""),
        ("router", "router", ""),
        ("tokenizer", "tokenizer", ""),
        ("kvcache-0", "kvcache", ""),
        ("worker-0", "worker", "prefill"),
        ("worker-1", "worker", "prefill"),
        ("worker-2", "worker", "decode"),
        ("gateway", "gateway", ""),
    ]
    without = config.model_copy(update={"gateway": GatewayConfig(enabled=False)})
    assert plan_members(without) == plan_members(config)[:-1]


def test_launch_plan_a_mesh_without_a_receiver_keeps_no_traces():
    config = MeshConfig(telemetry=TelemetryConfig(traces=False))
    assert all(plan.needed for plan in plan_members(config))


def test_launch_plan_the_receiver_may_fail_once_it_was_tried():
    process = MemberProcess(MemberPlan("traces", "traces"), RestartPolicy(max_start_crashes=2))
    assert not process.settled
    process.started(100)
    assert not process.settled
    process.exited(1, 0.0)
    assert process.settled
    crashed(process, 1.0)
    assert process.phase is Phase.FAILED
    assert process.settled


def test_launch_plan_stops_what_takes_requests_first_and_each_member_once():
    members = plan_members(MeshConfig(kvcache=KvCacheConfig(shards=0)))
    workers = ("worker-0", "worker-1")
    assert stop_order(members) == (
        ("gateway",), ("router",), workers, ("tokenizer",), ("traces",)
    )  # fmt: skip


def test_launch_plan_back_off_doubles_up_to_its_limit():
    policy = RestartPolicy(first_s=0.5, max_s=3.0)
    assert [policy.delay_s(n) for n in (1, 2, 3, 4, 1000)] == [0.5, 1.0, 2.0, 3.0, 3.0]


def crashed(process: MemberProcess, now: float, code: int = -9) -> None:
    process.started(100)
    process.exited(code, now)


def test_launch_plan_a_crash_after_ready_is_tried_for_ever():
    process = MemberProcess(PLAN, RestartPolicy(first_s=1.0, max_s=8.0, max_start_crashes=2))
    process.started(100)
    process.became_ready(("127.0.0.1:4000",), 10.0)
    process.exited(-9, 11.0)
    assert (process.phase, process.retry_at, process.pid) == (Phase.BACKOFF, 12.0, None)
    for crash in range(20):
        crashed(process, 20.0 + crash, code=2)
        assert process.phase is Phase.BACKOFF
    assert process.retry_at == 39.0 + 8.0
    assert process.restarts == 20
    assert process.addresses == ("127.0.0.1:4000",)


def test_launch_plan_a_stable_time_forgets_old_crashes():
    process = MemberProcess(PLAN, RestartPolicy(first_s=1.0, stable_s=30.0))
    process.started(100)
    process.became_ready(("a:1",), 0.0)
    process.exited(1, 1.0)
    process.started(101)
    process.became_ready(("a:1",), 2.0)
    process.exited(1, 31.9)
    assert process.crashes == 2
    process.started(102)
    process.became_ready(("a:1",), 40.0)
    process.exited(1, 70.0)
    assert (process.crashes, process.retry_at) == (1, 71.0)


@pytest.mark.parametrize(("codes", "phase"), [((1, 1), Phase.BACKOFF), ((1, 1, 1), Phase.FAILED)])
def test_launch_plan_gives_up_on_what_never_started(codes: tuple[int, ...], phase: Phase):
    process = MemberProcess(PLAN, RestartPolicy(max_start_crashes=3))
    for code in codes:
        crashed(process, 0.0, code)
    assert process.phase is phase


def test_launch_plan_a_bad_configuration_is_not_tried_again():
    process = MemberProcess(PLAN)
    crashed(process, 0.0, code=2)
    assert process.phase is Phase.FAILED


def test_launch_plan_an_exit_that_was_asked_for_is_no_crash():
    process = MemberProcess(PLAN)
    process.started(100)
    process.became_ready(("a:1",), 0.0)
    process.stopping()
    assert process.phase is Phase.STOPPING
    process.became_ready(("a:1",), 1.0)  # said just before it heard of the stop
    assert process.phase is Phase.STOPPING
    process.exited(-15, 2.0)
    assert (process.phase, process.crashes, process.retry_at) == (Phase.STOPPED, 0, None)


def test_launch_plan_ports_of_a_restart():
    assert port_environment(()) == {}
    assert port_environment(("127.0.0.1:50051", "[::1]:4001")) == {
        "KVMESH_PORT": "50051",
        "KVMESH_MESH_PORT": "4001",
    }


def test_launch_plan_metrics_ports_count_on_from_the_routers():
    config = MeshConfig(telemetry=TelemetryConfig(metrics_port=9464))
    plans = [plan for plan in plan_members(config) if plan.kind != "traces"]  # it shows none
    ports = [metrics_port(config, plan.member_id) for plan in plans]
    assert ports == list(range(9464, 9464 + len(ports)))
    assert metrics_port(MeshConfig(), "worker-1") == 0


def test_launch_plan_a_restarted_member_gets_its_metrics_port_back():
    environment = port_environment(("127.0.0.1:1",), "127.0.0.1:9470")
    assert environment == {"KVMESH_PORT": "1", "KVMESH_METRICS_PORT": "9470"}
