"""One of TRL's contestants: ``python -m benchmarks.peers.trl_side SPEC.json``, with .venv-peers on the path.

TRL's own training loop runs; a callback stops it after each step until the next one is ordered. Methods are overridden
only to read the clock, and to generate the reference's completions in the contestant that generates twice.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.peers import plan as settings
from benchmarks.peers.orders import Orders, peak_bytes


class MeasuredTrainer(GRPOTrainer):
    """GRPOTrainer that records the seconds of each phase of a step."""

    phases: dict[str, float]
    lengths: list[int]
    reference_tokens = 0
    """Of the last step."""
    loss = 0.0
    record: Path | None = None
    """File for the completions, loss and gradient norm of the first step; None: not recorded."""

    def _generate(self, prompts: list[Any]) -> Any:
        began = time.perf_counter()
        output = super()._generate(prompts)
        self.phases["rollout"] = time.perf_counter() - began
        self.lengths = [len(ids) for ids in output[1]]
        return output

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        began = time.perf_counter()
        output = super()._generate_and_score_completions(inputs)
        self.phases["score"] = time.perf_counter() - began - self.phases["rollout"]
        if self.record:
            self._recorded = recorded(self.model, output)
        return output

    def compute_loss(self, *arguments: Any, **more: Any) -> torch.Tensor:
        loss = super().compute_loss(*arguments, **more)
        self.loss = loss.item()
        return loss

    def training_step(self, *arguments: Any, **more: Any) -> torch.Tensor:
        loss = super().training_step(*arguments, **more)
        if self.record:
            gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
            # In float64: torch's own norm of a float32 tensor is off by a hundredth at 100 million entries.
            norm = torch.stack([torch.linalg.vector_norm(g, dtype=torch.float64) for g in gradients]).norm().item()
            self.record.write_text(json.dumps({**self._recorded, "loss": self.loss, "gradient_norm": norm}))
            self.record = None
        return loss


class TwiceGeneratingTrainer(MeasuredTrainer):
    """AAPO as its authors run it: fresh completions of the frozen reference each step, compared by index."""

    def __init__(self, *arguments: Any, reference: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.reference = reference

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        began = time.perf_counter()
        with torch.no_grad():
            generated = self.reference.generate(
                input_ids=output["prompt_ids"],
                attention_mask=output["prompt_mask"],
                generation_config=self.generation_config,
            )[:, output["prompt_ids"].shape[1] :]
        ended = torch.isin(generated, torch.tensor(self.eos_token_ids)).cumsum(1)
        after_end = ended - torch.isin(generated, torch.tensor(self.eos_token_ids)).long() > 0
        self.reference_tokens = int((~after_end).sum())
        rewards = torch.tensor([settings.reward(ids) for ids in completions_of(output)])
        reference_rewards = torch.tensor(
            [settings.reward(ids[~gone].tolist()) for ids, gone in zip(generated, after_end, strict=True)]
        )
        output["advantages"] = output["advantages"] + (rewards - reference_rewards).clamp(*settings.MARGIN)
        self.phases["reference"] = time.perf_counter() - began
        return output


def completions_of(output: dict[str, Any]) -> list[list[int]]:
    """Token ids of each completion, without padding."""
    return [
        ids[mask.bool()].tolist() for ids, mask in zip(output["completion_ids"], output["completion_mask"], strict=True)
    ]


@torch.no_grad()
def recorded(model: Any, output: dict[str, Any]) -> dict[str, Any]:
    """Prompts, completions, and transformers' log-probs for them, computed one by one to save memory."""
    prompts = [ids[mask.bool()] for ids, mask in zip(output["prompt_ids"], output["prompt_mask"], strict=True)]
    completions, logprobs = completions_of(output), []
    for prompt, completion in zip(prompts, completions, strict=True):
        targets = torch.tensor(completion)
        logits = model(input_ids=torch.cat([prompt, targets])[None]).logits[0, len(prompt) - 1 : -1]
        logprobs.append(logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0].tolist())
    return {"prompts": [prompt.tolist() for prompt in prompts], "completions": completions, "logprobs": logprobs}


class OnOrder(TrainerCallback):
    """Stops the training loop until a step is ordered."""

    trainer: MeasuredTrainer
    """The trainer that calls this; set once it is made."""

    def __init__(self, orders: Orders) -> None:
        self.orders = orders

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.orders.answer(fill_cpu=0.0)
        self._wait(control)

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        trainer = self.trainer
        spent = sum(trainer.phases.values())
        wall = time.perf_counter() - self._began
        trainer.phases["train"] = wall - spent
        self.orders.answer_step(
            lengths=trainer.lengths,
            reference_tokens=trainer.reference_tokens,
            loss=trainer.loss,
            phases=dict(trainer.phases),
        )
        self._wait(control)

    def _wait(self, control: Any) -> None:
        while (order := self.orders.next()) is not None and order["do"] != "step":
            self.orders.answer(peak_bytes=peak_bytes())
        if order is None:
            control.should_training_stop = True
            return
        torch.set_num_threads(order["threads"])
        self.trainer.phases = dict.fromkeys(("rollout", "score", "reference", "refit"), 0.0)
        self._began = time.perf_counter()


def build(spec: dict[str, Any], orders: Orders) -> MeasuredTrainer:
    """The trainer of a contestant."""
    plan, model = settings.Plan(**spec["plan"]), Path(spec["model"])
    questions = [json.loads(line)["question"] for line in Path(spec["prompts"]).read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(model, model_input_names=["input_ids", "attention_mask"])
    chats = [[{"role": "user", "content": question}] for question in questions]

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)

    twice = settings.TRL[spec["name"]]
    on_order = OnOrder(orders)
    trainer = (TwiceGeneratingTrainer if twice else MeasuredTrainer)(
        load(),
        reward_funcs=lambda completion_ids, **_: [settings.reward(ids) for ids in completion_ids],
        args=GRPOConfig(
            output_dir=spec["folder"],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            beta=0.0,
            num_iterations=1,
            loss_type="dapo",
            epsilon=settings.CLIP,
            num_generations=plan.group_size,
            per_device_train_batch_size=plan.sequences,
            gradient_accumulation_steps=1,
            max_completion_length=plan.new_tokens,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            learning_rate=settings.LEARNING_RATE,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=settings.MAX_GRADIENT_NORM,
            max_steps=settings.STEPS_AT_MOST,
            shuffle_dataset=False,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"prompt": chats if tokenizer.chat_template else questions}),
        processing_class=tokenizer,
        callbacks=[on_order],
        **({"reference": load().eval()} if twice else {}),
    )
    on_order.trainer = trainer
    trainer.record = Path(spec["record"]) if spec.get("record") else None
    return trainer


def main(path: str) -> None:
    """One contestant: TRL's, step by step as the orders come in."""
    orders = Orders()
    torch.set_num_threads(1)
    build(json.loads(Path(path).read_text()), orders).train()


if __name__ == "__main__":
    main(sys.argv[1])
