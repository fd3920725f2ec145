"""Membership, admission, cost and the choice made from them, on examples worked out by hand."""

import random

import pytest

from kvmesh.services.common.config import RouterConfig
from kvmesh.services.common.errors import Incompatible, InvalidRequest, NotFound, Overloaded
from kvmesh.services.router.admission import Admission
from kvmesh.services.router.core import Decision, RouteQuery, RouterCore
from kvmesh.services.router.cost import (
    CostModel,
    Place,
    Prompt,
    StepEstimate,
    WorkerLoad,
    decode_seconds,
    handover,
    prefill_seconds,
    queue_seconds,
    single,
    transfer_seconds,
)
from kvmesh.services.router.membership import Membership
from kvmesh.v1 import common_pb2, inference_pb2, mesh_pb2, worker_pb2

MODEL = inference_pb2.ModelInfo(
    name="mini",
    vocab_size=100,
    max_context=4096,
    format=common_pb2.BlockFormat(fingerprint=b"f" * 16, codec="k4v4", block_size=64),
)
# Powers of two, so that sums are exact.
ESTIMATE = StepEstimate(base_s=0.5, prefill_token_s=0.25, decode_token_s=2.0, context_token_s=0.0)
COST = CostModel(
    step_tokens=100,
    transfer_bytes_s=1024.0,
    transfer_base_s=0.125,
    expected_output=4,
    block_bytes=512,
)


def member(
    member_id: str, incarnation: int = 1, kind: str = "worker", role: str = "both"
) -> mesh_pb2.Member:
    found = mesh_pb2.Member(
        member_id=member_id, incarnation=incarnation, kind=kind, address="127.0.0.1:1"
    )
    if kind == "worker":
        found.role = role
        found.model.CopyFrom(MODEL)
    return found


class TestMembership:
    def test_a_lease_lasts_from_its_last_renewal(self) -> None:
        mesh = Membership(3.0)
        mesh.register(member("worker-0"), 10.0)
        mesh.renew("worker-0", 1, False, 12.0)
        assert mesh.expire(14.9) == []
        assert [x.member.member_id for x in mesh.expire(15.0)] == ["worker-0"]
        with pytest.raises(NotFound, match="worker-0"):
            mesh.renew("worker-0", 1, False, 15.0)

    def test_a_lease_that_ran_out_is_not_renewed_before_it_is_swept(self) -> None:
        mesh = Membership(3.0)
        mesh.register(member("worker-0"), 10.0)
        with pytest.raises(NotFound):
            mesh.renew("worker-0", 1, False, 13.0)

    def test_another_incarnation_replaces_at_once(self) -> None:
        mesh = Membership(3.0)
        first = mesh.register(member("worker-0", 1), 0.0)
        again = mesh.register(member("worker-0", 1), 1.0)
        assert (again.fresh, again.replaced) == (False, None)
        second = mesh.register(member("worker-0", 2), 2.0)
        assert second.fresh
        assert second.replaced is first.lease
        assert mesh.leave("worker-0", 1) is None, "the life that is over cannot leave"
        with pytest.raises(NotFound):
            mesh.renew("worker-0", 1, False, 2.0)
        assert mesh.leave("worker-0", 2) is second.lease
        assert mesh.leave("worker-0", 2) is None

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("codec", "fp32"),
            ("codec", "k4v4+0:k8v8"),  # another codec in one layer only
            ("fingerprint", b"g" * 16),
            ("block_size", 32),
        ],
    )
    def test_the_first_worker_sets_the_format_for_good(self, field: str, value: object) -> None:
        mesh = Membership(3.0)
        mesh.register(member("worker-0"), 0.0)
        mesh.leave("worker-0", 1)
        other = member("worker-1")
        setattr(other.model.format, field, value)
        with pytest.raises(Incompatible, match="k4v4"):
            mesh.register(other, 0.0)
        mesh.register(member("worker-2"), 0.0)
        mesh.register(member("kvcache-0", kind="kvcache"), 0.0)

    def test_a_life_keeps_its_kind_role_and_address(self) -> None:
        """What was made for the member when it joined would be left behind."""
        mesh = Membership(3.0)
        mesh.register(member("a", kind="tokenizer"), 0.0)
        moved = member("a", kind="tokenizer")
        moved.address = "127.0.0.1:2"
        for other in (member("a", kind="kvcache"), member("a"), moved):
            with pytest.raises(InvalidRequest, match=r"127\.0\.0\.1:1.*incarnation"):
                mesh.register(other, 1.0)
        assert mesh.register(member("a", kind="tokenizer"), 2.0).fresh is False
        moved.incarnation = 2
        assert mesh.register(moved, 3.0).fresh

    @pytest.mark.parametrize(
        "address",
        ["", " ", "127.0.0.1", "127.0.0.1:", ":1", "127.0.0.1:0", "127.0.0.1:99999", "unix:/x:1",
         "dns:///a:1", "a b:1", "[::1:5", "a\x00:1", "é:1", "a" * 254 + ":1"],
    )  # fmt: skip
    def test_an_address_is_a_host_and_a_port(self, address: str) -> None:
        mesh = Membership(3.0)
        broken = member("a", kind="tokenizer")
        broken.address = address
        with pytest.raises(InvalidRequest, match="address"):
            mesh.register(broken, 0.0)
        for right in ("localhost:1", "10.0.0.1:65535", "[::1]:50051", "a-b.example.com:80"):
            broken.address, broken.incarnation = right, broken.incarnation + 1
            mesh.register(broken, 0.0)

    def test_malformed_members_are_refused(self) -> None:
        mesh = Membership(3.0)
        for broken in (
            member(""),
            member("x" * 129),
            member("worker-0", 0),
            member("worker-0", role="chef"),
            member("x", kind="proxy"),
        ):
            with pytest.raises(InvalidRequest):
                mesh.register(broken, 0.0)
        assert mesh.leases() == []


class TestAdmission:
    def test_places_are_counted_and_given_back(self) -> None:
        gate = Admission(max_active=2, max_waiting_s=5.0)
        gate.enter("a", 0.0)
        gate.enter("b", 0.0)
        with pytest.raises(Overloaded, match="2 requests are active, at most 2"):
            gate.enter("c", 0.0)
        gate.leave("c", 1.0, finished=False)
        gate.leave("a", 1.0, finished=True)
        gate.enter("d", 1.0)
        assert (gate.active, gate.total, gate.rejected) == (2, 4, 1)

    def test_the_retry_delay_follows_how_long_requests_take(self) -> None:
        gate = Admission(max_active=2, max_waiting_s=5.0)
        for number in range(100):
            gate.enter(str(number), 0.0)
            gate.leave(str(number), 8.0, finished=True)
        gate.enter("a", 0.0)
        gate.enter("b", 0.0)
        with pytest.raises(Overloaded) as caught:
            gate.enter("c", 0.0)
        assert caught.value.retry_after_s == pytest.approx(4.0, rel=0.01)

    def test_a_long_wait_is_refused_with_the_time_until_it_is_short(self) -> None:
        gate = Admission(max_active=2, max_waiting_s=5.0)
        gate.check_wait(5.0)
        with pytest.raises(Overloaded, match=r"7\.5 s, at most 5 s") as caught:
            gate.check_wait(7.5)
        assert caught.value.retry_after_s == 2.5


class TestCost:
    """step of prefill: base 0.5 + 2 per decoding sequence; 0.25 per prompt token."""

    def test_queue_is_the_backlog_in_steps(self) -> None:
        load = WorkerLoad("w", "both", ESTIMATE, running=3, backlog_tokens=150)
        assert queue_seconds(COST, load) == 2 * (0.5 + 3 * 2.0) + 150 * 0.25
        assert queue_seconds(COST, WorkerLoad("w", "both", ESTIMATE)) == 0.0

    def test_prefill_pays_for_uncached_tokens_and_what_they_attend_to(self) -> None:
        estimate = StepEstimate(0.0, 0.0, 0.0, context_token_s=1.0)
        load = WorkerLoad("w", "both", estimate)
        # Tokens 6 to 10 attend to 6 + 7 + 8 + 9 + 10 tokens.
        assert prefill_seconds(COST, load, Prompt(10, local=3, remote=2)) == 40.0
        # All cached: the last one is computed all the same.
        assert prefill_seconds(COST, load, Prompt(10, local=10)) == 10.0

    def test_transfer_is_whole_blocks_at_the_rate(self) -> None:
        assert transfer_seconds(COST, 0) == 0.0
        assert transfer_seconds(COST, 64) == 0.125 + 0.5
        assert transfer_seconds(COST, 65) == 0.125 + 1.0

    def test_decode_is_one_step_per_token(self) -> None:
        load = WorkerLoad("w", "both", ESTIMATE, running=1)
        assert decode_seconds(load, 100, 4) == 4 * (0.5 + 2 * 2.0)

    def test_single_and_handover_add_up(self) -> None:
        first = WorkerLoad("p", "prefill", ESTIMATE)
        second = WorkerLoad("d", "decode", ESTIMATE, backlog_tokens=100)
        alone = single(COST, second, Prompt(200, local=64, remote=64), 4)
        assert alone.queue_s == 0.5 + 25.0
        assert alone.prefill_s == 0.5 + 72 * 0.25
        assert alone.transfer_s == 0.625
        assert alone.decode_s == 4 * 2.5
        assert alone.total_s == 25.5 + 18.5 + 0.625 + 10.0
        pair = handover(COST, Place(first, Prompt(200)), Place(second, Prompt(200, local=64)), 4)
        assert pair.prefill_s == 2 * 0.5 + 200 * 0.25
        assert pair.queue_s == 0.0, "the decode worker's 25.5 s pass during the 51 s of prefill"
        # Put of 3 sealed blocks, fetch of the 2 that are missing there, and the tail.
        assert pair.transfer_s == (0.125 + 1.5) + (0.125 + 1.0) + 0.125
        assert pair.decode_s == 4 * 2.5


def core_of(*roles: str, **config: int) -> RouterCore:
    core = RouterCore(RouterConfig(**config), CostModel(block_bytes=4096))  # type: ignore[arg-type]
    for number, role in enumerate(roles):
        name = f"worker-{number}"
        core.workers.join(member(name, role=role))
        core.workers.connected(name, True)
        core.holder_joined(name, 1, shard=False)
    return core


def keys(count: int) -> list[bytes]:
    return [number.to_bytes(16, "big") for number in range(count)]


def hold(core: RouterCore, holder: str, held: list[bytes], shard: bool = False) -> None:
    core.holder_joined(holder, 1, shard)
    core.index.apply(
        holder, common_pb2.BlockEvents(incarnation=1, sequence=1, snapshot=True, stored=held)
    )


def choose(core: RouterCore, tokens: int, request_id: str = "r", **more: object) -> Decision:
    query = RouteQuery(request_id, tokens, keys(tokens // 64), 64, **more)  # type: ignore[arg-type]
    return core.choose(query, 0.0)


def chosen(decision: Decision) -> tuple[str, str]:
    assert decision.chosen is not None, decision.reason
    return decision.chosen.prefill_worker, decision.chosen.decode_worker


class TestDecisions:
    @pytest.mark.parametrize(
        ("roles", "tokens", "want"),
        [
            (("both",), 1000, ("", "worker-0")),
            (("prefill", "decode"), 100, ("", "worker-1")),  # short
            (("prefill", "decode"), 255, ("", "worker-1")),
            (("prefill", "decode"), 256, ("worker-0", "worker-1")),
            (("prefill", "both"), 1000, ("worker-0", "worker-1")),
            (("prefill",), 1000, ("", "worker-0")),  # nobody else is left
            (("decode",), 1000, ("", "worker-0")),
        ],
    )
    def test_roles_steer(self, roles: tuple[str, ...], tokens: int, want: tuple[str, str]) -> None:
        assert chosen(choose(core_of(*roles), tokens)) == want

    def test_mostly_cached_prompts_are_not_handed_over(self) -> None:
        core = core_of("prefill", "decode")
        hold(core, "kvcache-0", keys(12), shard=True)
        decision = choose(core, 1000)
        assert chosen(decision) == ("", "worker-1")
        (pair,) = (c for c in decision.candidates if c.prefill_worker)
        assert pair.rejected == "232 uncached tokens, hand-over from 256"

    def test_a_request_that_generates_already_is_not_handed_over(self) -> None:
        core = core_of("prefill", "decode")
        assert chosen(choose(core, 1000, handover=False)) == ("", "worker-1")

    def test_a_hand_over_that_waits_too_long_is_not_waited_for(self) -> None:
        core = core_of("prefill", "decode")
        core.workers.reported("worker-0", worker_pb2.LoadReport(pending_prefill_tokens=100_000))
        assert chosen(choose(core, 1000)) == ("", "worker-1")

    def test_the_holder_of_the_prefix_wins_unless_it_is_too_busy(self) -> None:
        core = core_of("both", "both")
        hold(core, "worker-1", keys(10))
        decision = choose(core, 1000)
        assert chosen(decision) == ("", "worker-1")
        assert decision.chosen is not None
        assert (decision.chosen.prompt.local, decision.chosen.prompt.uncached) == (640, 360)
        core.workers.sent("worker-1", "a", 900)  # more than the 640 tokens that it would save
        assert chosen(choose(core, 1000)) == ("", "worker-0")
        core.workers.first_token("worker-1", "a")
        core.workers.ended("worker-1", "a")
        assert chosen(choose(core, 1000)) == ("", "worker-1")

    def test_a_fully_cached_prompt_leaves_its_last_block_to_compute(self) -> None:
        core = core_of("both")
        hold(core, "worker-0", keys(4))
        decision = choose(core, 256)
        assert decision.chosen is not None
        assert decision.chosen.prompt == Prompt(256, local=192)

    def test_siblings_follow_the_first_of_their_burst(self) -> None:
        core = core_of("both", "both", "both")
        query = RouteQuery("first", 1000, keys(15), 64)
        first = core.choose(query, 0.0).chosen
        assert first is not None
        core.expect(query, first, 0.0)
        for number in range(20):
            assert chosen(choose(core, 1000, f"sibling-{number}")) == ("", first.decode_worker)
        late = core.choose(RouteQuery("late", 1000, keys(15), 64), 1000.0).chosen
        assert late is not None
        assert late.prompt.local == 0
        core.workers.join(member(first.decode_worker, 2))
        core.workers.connected(first.decode_worker, True)
        core.holder_joined(first.decode_worker, 2, shard=False)
        assert all(c.prompt.local == 0 for c in choose(core, 1000).candidates)

    def test_ties_go_to_the_fewest_running_then_by_request(self) -> None:
        core = core_of("both", "both", "both")
        shares = [chosen(choose(core, 100, f"r{n}"))[1] for n in range(60)]
        assert {shares.count(f"worker-{n}") > 5 for n in range(3)} == {True}
        assert shares == [chosen(choose(core, 100, f"r{n}"))[1] for n in range(60)]

    def test_who_was_slow_is_tried_again_after_a_while_without_requests(self) -> None:
        """Else a worker whose last steps came while its machine was busy never learned better."""
        core = core_of("both", "both")
        fast, slow = (worker_pb2.Estimate(base_s=s, prefill_token_s=1e-5) for s in (0.01, 1.0))
        for name in ("worker-0", "worker-1"):
            core.workers.reported(name, worker_pb2.LoadReport(estimate=fast))
        core.workers.reported("worker-1", worker_pb2.LoadReport(estimate=slow))

        def at(now: float) -> str:
            return chosen(core.choose(RouteQuery("r", 100, (), 64), now))[1]

        busy = worker_pb2.LoadReport(running=1, estimate=fast)
        core.workers.reported("worker-0", busy)
        assert at(100.0) == at(104.9) == "worker-0"
        assert at(105.0) == "worker-1"
        # An idle worker goes on reporting what it believes.
        core.workers.reported("worker-1", worker_pb2.LoadReport(estimate=slow))
        assert at(106.0) == "worker-1"
        core.workers.sent("worker-1", "a", 0)
        assert at(107.0) == "worker-0"
        core.workers.ended("worker-1", "a")  # and it had not become faster
        assert at(108.0) == at(112.9) == "worker-0"
        assert at(113.0) == "worker-1"

    def test_only_its_like_and_itself_speak_for_who_is_doubted(self) -> None:
        core = core_of("both", "decode")
        fast, slow = (worker_pb2.Estimate(base_s=s, prefill_token_s=1e-5) for s in (0.01, 1.0))
        core.workers.reported("worker-0", worker_pb2.LoadReport(running=1, estimate=fast))
        core.workers.reported("worker-1", worker_pb2.LoadReport(estimate=slow))
        for now in (0.0, 100.0):
            assert chosen(core.choose(RouteQuery("r", 100, (), 64), now)) == ("", "worker-0")
        again = core_of("both", "decode")
        again.workers.reported("worker-0", worker_pb2.LoadReport(running=1, estimate=fast))
        for estimate in (fast, slow):
            again.workers.reported("worker-1", worker_pb2.LoadReport(estimate=estimate))
        for now, best in ((0.0, "worker-0"), (100.0, "worker-1")):
            assert chosen(again.choose(RouteQuery("r", 100, (), 64), now)) == ("", best)

    def test_who_cannot_take_it_is_named_with_the_reason(self) -> None:
        core = core_of("both", "both", "both")
        core.workers.draining("worker-0", True)
        core.workers.connected("worker-1", False)
        decision = choose(core, 1000, exclude=frozenset({"worker-2"}))
        assert decision.chosen is None
        assert "worker-0: draining" in decision.reason
        assert "worker-1: connecting" in decision.reason
        assert "worker-2: failed this request before" in decision.reason
        assert "4096 prompt tokens, at most 4095 fit" in choose(core_of("both"), 4096).reason

    def test_all_candidates_are_listed_best_first(self) -> None:
        decision = choose(core_of("prefill", "prefill", "decode", "both"), 1000)
        assert len(decision.candidates) == 4 + 2 * 2
        usable = [c for c in decision.candidates if not c.rejected]
        assert usable == list(decision.candidates[: len(usable)])
        assert [c.total_s for c in usable] == sorted(c.total_s for c in usable)
        assert [c.chosen for c in decision.candidates] == [True] + [False] * 7
        assert core_of().choose(RouteQuery("r", 1, [], 1), 0.0).reason == "no worker is in the mesh"


def test_of_many_pairs_a_shortlist_finds_the_best() -> None:
    """Against all pairs, weighed one by one, under random loads."""
    rng = random.Random(5)
    worse = []
    for number in range(40):
        core = RouterCore(RouterConfig(), CostModel(block_bytes=20_000))
        for index in range(30):
            role = "prefill" if index % 3 == 0 else "decode"
            name = f"{role}-{index}"
            core.workers.join(
                mesh_pb2.Member(
                    member_id=name, incarnation=1, role=role,
                    model=inference_pb2.ModelInfo(max_context=100_000),
                )
            )  # fmt: skip
            core.workers.connected(name, True)
            report = worker_pb2.LoadReport(
                running=rng.randrange(60), pending_prefill_tokens=rng.randrange(20_000)
            )
            core.workers.reported(name, report)
        decision = core.choose(RouteQuery(f"r{number}", 4000, (), 200), now=0.0)
        loads = core.workers.loads(64, now=0.0)
        every = [
            handover(core.model, Place(p, Prompt(4000)), Place(d, Prompt(4000)), 128).total_s
            for p in loads
            if p.role == "prefill"
            for d in loads
            if d.role == "decode"
        ]
        assert len(every) == 200
        assert decision.chosen is not None and decision.chosen.prefill_worker
        worse.append(decision.chosen.total_s / min(every) - 1)
        alone = [c for c in decision.candidates if not c.prefill_worker]
        assert len(alone) == 30 and all(c.rejected for c in alone)
    assert max(worse) < 0.02 and sum(w < 1e-9 for w in worse) >= 30
