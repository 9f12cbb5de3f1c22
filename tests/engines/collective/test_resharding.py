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

    def __init__(self, folder, shared: Path, name: str, first: int, ranks: int, tp: int, pp: int, ep: int) -> None:
        from nemo_aapo.config.compose import load_config
        from nemo_aapo.launch.world import Machine, decide
        from nemo_aapo.mcore import precision
        from nemo_aapo.mcore.bridge.weights import WeightMap
        from nemo_aapo.mcore.groups import initialize_model_parallel
        from nemo_aapo.mcore.model import build_module

        rank = dist.get_rank() - first
        dist.destroy_process_group()
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
        self.vocab_size = json.loads((Path(config.model.path) / "config.json").read_text())["vocab_size"]

    def exported(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in self.map.export(self.module)}


def _refitted(folder, shared, trainer, server, refits):
    """Both sides' weights after some refits: those of the trainer's ranks, then those of the server's."""
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


PATIENCE_S = 2.0


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
        time.sleep(1.5 * PATIENCE_S)
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
    assert found["refuses"] == ("HTTP 500: it is ill", pytest.approx(0.2, abs=PATIENCE_S / 2))
    for fault in ("dies", "hangs"):
        assert "sending weights failed" in found[fault][0]
    assert "another kind or precision" in found["other model"][0]
    assert max(seconds for _, seconds in found.values()) < 5 * PATIENCE_S  # a loaded machine
    assert found["none"][0] == ""
    assert "did not arrive as the trainer has it" in raised[0]
    assert "decoder.of.another.model" in raised[1]
    assert all(torch.equal(got[name], tensor) for name, tensor in wanted.items())
