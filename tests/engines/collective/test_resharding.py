"""Weights go from the trainer's layout into a server's, bit for bit; whoever dies, is late or does not fit is named."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.training_runs import make_input, settings

TIMEOUT_S = 60.0


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[bool, Path]:
    """Of a dense model, and of one with experts."""
    return {experts: make_input(tmp_path_factory.mktemp("model"), experts) for experts in (False, True)}


class Side:
    """One side's ranks within those of the pool, as a job of their own."""

    def __init__(
        self, folder, shared: Path, name: str, first: int, ranks: int, tp: int, pp: int, ep: int, lora: bool = False
    ) -> None:
        from nemo_aapo.config.compose import load_config
        from nemo_aapo.config.schema import Lora
        from nemo_aapo.launch.world import Machine, decide
        from nemo_aapo.mcore import precision
        from nemo_aapo.mcore.bridge.lora import add_adapters, is_adapted
        from nemo_aapo.mcore.bridge.weights import WeightMap
        from nemo_aapo.mcore.groups import destroy_model_parallel, initialize_model_parallel
        from nemo_aapo.mcore.model import build_module

        rank = dist.get_rank() - first
        destroy_model_parallel()
        store = dist.FileStore(str(shared / name), ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=TIMEOUT_S))
        initialize_model_parallel(
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            expert_model_parallel_size=ep,
            seed=1,
            timeout_s=TIMEOUT_S,
        )
        words = [f"model.tensor_model_parallel_size={tp}", f"model.pipeline_model_parallel_size={pp}"]
        words += [f"model.expert_model_parallel_size={ep}", f"model.sequence_parallel={str(ep > 1 and tp > 1).lower()}"]
        config = decide(load_config(settings(folder, folder / "run", *words)), Machine.present())
        self.map = WeightMap(config.model.path, precision.dtype(config))
        self.module = build_module(config, self.map)
        if name == "t":
            self.map.load(self.module)  # random ones would differ from copy to copy
        if lora:
            add_adapters(self.module, Lora(4, 8, ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")), seed=0)
            for adapter in (part.adapter for part in self.module.modules() if is_adapted(part)):
                torch.nn.init.normal_(adapter.linear_out.weight, std=0.02)
        self.vocab_size = json.loads((Path(config.model.path) / "config.json").read_text())["vocab_size"]

    def exported(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in self.map.export(self.module)}


def _refitted(folder, shared, trainer, server, refits):
    """Both sides' weights after some refits over one group: of the trainer's ranks, then of the server's."""
    from nemo_aapo.engines.collective.plan import Rendezvous
    from nemo_aapo.engines.collective.receiver import WeightReceiver
    from nemo_aapo.engines.collective.sender import WeightSender
    from nemo_aapo.engines.remote.directory import ServerRecord
    from nemo_aapo.engines.remote.wire import WeightsId

    senders = trainer["ranks"]
    sends = dist.get_rank() < senders
    record = ServerRecord(0, "http://127.0.0.1:1", 1, "one", ranks=server["ranks"])
    side = Side(folder, shared, *(("t", 0) if sends else ("s", senders)), **(trainer if sends else server))
    if sends:
        sender = WeightSender(side.module, side.vocab_size, TIMEOUT_S)
    else:
        receiver = WeightReceiver(side.module, side.vocab_size, 0, TIMEOUT_S)
    groups = set()
    for version in range(1, refits + 1):
        told = shared / f"{version}.json"
        if sends:
            with torch.no_grad():
                for parameter in side.module.parameters():
                    parameter.mul_(1 + 0.1 * version)
            named = sender.digest()
            (where,) = sender.rendezvous([record])
            if dist.get_rank() == 0:
                told.with_suffix(".new").write_text(json.dumps([named, asdict(where)]))
                told.with_suffix(".new").rename(told)
            assert sender.send([record]) == [""]
            assert sender.sent_bytes > 10_000
        else:
            named, where = json.loads(_read(told))
            with receiver.meeting(Rendezvous(**where), WeightsId(version, named)) as take:
                take()
        groups.add(sender._meetings["one"][1].group if sends else receiver._meeting.group)
    assert len(groups) == 1  # kept while nobody fails
    return side.exported()


def _read(path: Path) -> str:
    end = time.monotonic() + TIMEOUT_S
    while not path.exists():
        assert time.monotonic() < end
        time.sleep(0.01)
    return path.read_text()


def layout(tp: int = 1, pp: int = 1, ep: int = 1, dp: int = 1) -> dict[str, int]:
    return {"ranks": tp * pp * dp, "tp": tp, "pp": pp, "ep": ep}


@pytest.mark.parametrize(
    ("trainer", "server", "experts"),
    [
        (layout(tp=2), layout(pp=2), False),
        (layout(pp=2), layout(tp=2), False),
        (layout(dp=2), layout(tp=2), False),
        (layout(), layout(tp=2), False),
        (layout(tp=2, ep=2), layout(pp=2), True),
        (layout(dp=2, ep=2), layout(tp=2, ep=2), True),
    ],
    ids=["TP2-PP2", "PP2-TP2", "DP2-TP2", "1-TP2", "TP2EP2-PP2", "DP2EP2-TP2EP2"],
)
def test_a_server_has_the_trainers_bits_whatever_both_layouts(ranks, folders, tmp_path, trainer, server, experts):
    world = trainer["ranks"] + server["ranks"]
    sides = ranks.run(_refitted, folders[experts], tmp_path, trainer, server, 2, world=world, tp=None)
    for name, wanted in sides[0].items():
        for rank, got in enumerate(sides[1:]):
            assert torch.equal(got[name], wanted), (rank + 1, name)


def _from_all_four_ranks(folder, shared, trainer, servers):
    """Digests of the trainer and of each server; and of each server the weights that differ. Ranks play both sides."""
    from concurrent.futures import ThreadPoolExecutor

    from nemo_aapo.engines.collective import meeting
    from nemo_aapo.engines.collective.digest import Digest, digest
    from nemo_aapo.engines.collective.plan import Rendezvous
    from nemo_aapo.mcore.state import weight_parts

    rank = dist.get_rank()
    side = Side(folder, shared, "t", 0, **trainer)
    sent, wanted = weight_parts(side.module, side.vocab_size), side.exported()
    digests, differing = [digest(sent)], []

    def store():
        return dist.FileStore(str(shared / "meetings"), -1)

    store().set(f"senders/{rank}", meeting.packed(meeting.boxes_of(sent)))

    def exchange(own, parts, index, receivers, sums):
        where = Rendezvous("", f"server{index}", trainer["ranks"], receivers)
        told = {"boxes": meeting.boxes_of(parts), "device": parts[0].tensor.device, "server": index}
        met = meeting.meet(store(), where, rank=own, timeout_s=TIMEOUT_S, **told)
        met.exchange(own, parts, each=sums.add)

    with ThreadPoolExecutor(2) as threads:
        for index, layout in enumerate(servers):
            work, sums = [threads.submit(exchange, rank, sent, index, layout["ranks"], Digest())], Digest()
            if rank < layout["ranks"]:
                side = Side(folder, shared, f"server{index}", 0, **layout)
                got = weight_parts(side.module, side.vocab_size)
                work.append(threads.submit(exchange, trainer["ranks"] + rank, got, index, layout["ranks"], sums))
            for one in work:
                one.result()
            if rank < layout["ranks"]:
                digests.append(sums.of_all_ranks())
                differing += [name for name, tensor in side.exported().items() if not torch.equal(tensor, wanted[name])]
    return digests, differing


@pytest.mark.parametrize("experts", [False, True], ids=["dense", "experts"])
def test_tp2_pp2_sends_its_bits_to_servers_of_every_layout(ranks, folders, tmp_path, experts):
    ep = 2 if experts else 1
    servers = [layout(tp=2, ep=ep), layout(pp=2), layout(), layout(), layout(tp=2, pp=2, ep=ep)]
    trainer = layout(tp=2, pp=2, ep=ep)
    found = ranks.run(_from_all_four_ranks, folders[experts], tmp_path, trainer, servers, world=4, tp=None)
    assert len(found[0][0]) == 1 + len(servers)
    assert {digest for digests, _ in found for digest in digests} == {found[0][0][0]}
    assert [differing for _, differing in found] == [[]] * 4


def test_a_server_without_adapters_has_the_trainers_weights_with_its_adapters_merged(ranks, folders, tmp_path):
    trainer = {**layout(tp=2), "lora": True}
    wanted, other, got = ranks.run(_refitted, folders[False], tmp_path, trainer, layout(), 2, world=3, tp=None)
    assert sorted(got) == sorted(wanted)
    for name, tensor in wanted.items():
        assert torch.equal(tensor, other[name]), name
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=1e-6)  # the Bridge adds B A up in its own order


# ---------------------------------------------------------------- who does not come, dies, hangs, or does not fit


class _Told:
    """What the trainer tells a server, which over HTTP would be ``update_weights``."""

    def __init__(self, shared: Path) -> None:
        self.shared, self.count = shared, 0

    def tell(self, named: str, where) -> None:
        self.count += 1
        path = self.shared / f"{self.count}.json"
        path.with_suffix(".new").write_text(json.dumps([named, asdict(where)]))
        path.with_suffix(".new").rename(path)

    def hear(self):
        from nemo_aapo.engines.collective.plan import Rendezvous
        from nemo_aapo.engines.remote.wire import WeightsId

        self.count += 1
        named, where = json.loads(_read(self.shared / f"{self.count}.json"))
        return Rendezvous(**where), WeightsId(1, named)


PATIENCE_S = 4.0


def _trainer_among_faults(side, told):
    """(Why sending failed, seconds until that was known) of each fault."""
    import threading

    from nemo_aapo.engines.collective.sender import WeightSender
    from nemo_aapo.engines.remote.directory import ServerRecord

    sender = WeightSender(side.module, side.vocab_size, PATIENCE_S)
    named, found = sender.digest(), {}
    for fault in ("nobody", "refuses", "dies", "hangs", "other weights", "other model", "none"):
        record = ServerRecord(0, "http://127.0.0.1:1", 1, "the same instance")
        (where,) = sender.rendezvous([record])
        if fault == "refuses":
            threading.Timer(0.2, sender.give_up, (where, "HTTP 500: it is ill")).start()
        elif fault != "nobody":
            told.tell("0" * 16 if fault == "other weights" else named, where)
        began = time.monotonic()
        (reason,) = sender.send([record])
        found[fault] = reason, time.monotonic() - began
        if fault == "other weights":  # of which it tells over HTTP
            sender.part_from(record)
    return found


def _server_among_faults(side, told):
    """What it raised at the last three, and its weights at the end."""
    import dataclasses

    from nemo_aapo.engines.collective.receiver import WeightReceiver
    from nemo_aapo.errors import WeightsError

    receiver = WeightReceiver(side.module, side.vocab_size, 0, PATIENCE_S)
    where, weights = told.hear()
    with receiver.meeting(where, weights):
        receiver.close()
    where, weights = told.hear()
    with receiver.meeting(where, weights):
        _read(told.shared / f"{told.count + 1}.json")  # longer than the trainer has patience
    raised = []
    where, weights = told.hear()
    with pytest.raises(WeightsError) as error, receiver.meeting(where, weights) as take:
        take()
    raised.append(str(error.value))
    parts = receiver._parts
    receiver._parts = [dataclasses.replace(parts[0], key="decoder.of.another.model"), *parts[1:]]
    where, weights = told.hear()
    with pytest.raises(WeightsError) as error, receiver.meeting(where, weights):
        pass
    raised.append(str(error.value))
    receiver._parts = parts
    where, weights = told.hear()
    with receiver.meeting(where, weights) as take:
        take()
    return raised


def _among_faults(folder, shared):
    sends, told = dist.get_rank() == 0, _Told(shared)
    side = Side(folder, shared, *(("t", 0) if sends else ("s", 1)), ranks=1, tp=1, pp=1, ep=1)
    return (_trainer_among_faults if sends else _server_among_faults)(side, told), side.exported()


def test_a_server_that_fails_holds_the_trainer_no_longer_than_its_deadline_and_gets_its_weights_later(
    ranks, folders, tmp_path
):
    (found, wanted), (raised, got) = ranks.run(_among_faults, folders[False], tmp_path, world=2, tp=None)
    assert "not all ranks came to the meeting in time" in found["nobody"][0]
    assert found["refuses"][0] == "HTTP 500: it is ill"
    for fault in ("dies", "hangs"):
        assert "sending weights failed" in found[fault][0]
    assert "another kind or precision" in found["other model"][0]
    assert max(seconds for _, seconds in found.values()) < TIMEOUT_S  # the groups' own
    assert found["none"][0] == ""
    assert "did not arrive as the trainer has it" in raised[0]
    assert "decoder.of.another.model" in raised[1]
    assert all(torch.equal(got[name], tensor) for name, tensor in wanted.items())
