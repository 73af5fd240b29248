"""The supervised term of the adaptive trainer in real runs of TRL, and its state in checkpoints."""

import pytest
import torch
from datasets import Dataset
from torch import Tensor

from iqareward import AdaptiveWeighter, FullReference
from iqareward.adapters.trl import TRLReward, adaptive_trainer
from tests.adapters import restoration_run, tool_agent
from tests.adapters.restoration_agent import SEEN, apply_operations, as_pil, build, photographs
from tests.tolerances import NETWORK_BATCH

trl = pytest.importorskip("trl")
pytestmark = [
    pytest.mark.trainer("TRL", "1.16.0", "run", "reader", "weights", "gradients"),
    # TRL 1.16 uses names that transformers 5.23 has renamed
    pytest.mark.filterwarnings("ignore:.* is deprecated and will be removed in v6:FutureWarning"),
    pytest.mark.filterwarnings("ignore::iqareward.rewards.core.UnscoredWarning"),
]
THOUGHT = "<think>\n\n</think>\n\n"  # Qwen's chat template, without a thought
CALL = {"type": "function", "function": {"name": "brightened", "arguments": {"factor": 1.5}}}
TARGETS = ["brighten", "brighten nothing", None, "blur darken"]


def closeness(images: Tensor, references: Tensor) -> Tensor:
    return 1 - (images - references).abs().mean((1, 2, 3))


DISTANCE = FullReference(closeness, higher_is_better=True, bounds=(None, 1.0))


FIDELITY = TRLReward(DISTANCE, "degraded", references="clean")


@pytest.fixture(autouse=True)
def _forget():
    SEEN.clear()


def rows(levels=(0.99, 0.9, 0.6, 0.3), prompts=("restore", "darken", "blur", "nothing"), targets=TARGETS) -> Dataset:
    """Prompts whose images are nearer to the ground truth, or farther from it."""
    clean = photographs(len(levels))
    degraded = [as_pil(image * level) for image, level in zip(clean, levels, strict=True)]
    columns = {"clean": [as_pil(image) for image in clean], "degraded": degraded, "best": list(targets)}
    return Dataset.from_dict({"prompt": list(prompts), **columns})


def length(completions: list[str], **columns) -> list[float]:
    """A reward with some spread."""
    return [float(len(text)) for text in completions]


def weighter(mode="convex") -> AdaptiveWeighter:
    made = AdaptiveWeighter(mode=mode)
    made.calibrate(torch.tensor([0.02, 0.1, 0.3]))
    return made


@pytest.mark.parametrize(
    ("trainer", "options"),
    [
        (trl.GRPOTrainer, {}),
        (trl.GRPOTrainer, {"loss_type": "grpo", "gradient_accumulation_steps": 2, "per_device_train_batch_size": 8}),
        (trl.RLOOTrainer, {"gradient_accumulation_steps": 2}),
    ],
    ids=["GRPO", "GRPO accumulated", "RLOO accumulated"],
)
def test_each_row_is_moved_by_its_weight(trainer, options, tmp_path) -> None:
    """The gradient is that of TRL's own loss plus each row's weight times the gradient of its target's likelihood."""
    found = []

    class Watched(adaptive_trainer(trainer, weighter(), FIDELITY, targets="best", sft_scale=0.5)):
        def compute_loss(self, model, inputs, *args, **more):
            loss = super().compute_loss(model, inputs, *args, **more)
            parameters = list(model.parameters())
            ours = torch.autograd.grad(loss, parameters, retain_graph=True)
            plain = torch.autograd.grad(trainer.compute_loss(self, model, inputs), parameters)
            found.append((inputs, [one - other for one, other in zip(ours, plain, strict=True)], direct(model, inputs)))
            return loss

    def direct(model, inputs):
        """Row by row without padding, a log-probability at a time."""
        total, texts = 0, trained.processing_class
        for prompt, mask, target, weight in zip(
            inputs["prompt_ids"], inputs["prompt_mask"], inputs["target_ids"], inputs["sft_weights"], strict=True
        ):
            start, answer = prompt[mask.bool()], target[target >= 0]
            if len(answer) == 0:
                continue
            assert texts.decode(answer) in [f"{text} <eos>" for text in TARGETS]
            logs = model(torch.cat([start, answer])[None]).logits[0].log_softmax(-1)
            total = total - weight * logs[len(start) - 1 : -1].gather(1, answer[:, None]).mean()
        scale = 0.5 / len(inputs["prompt_ids"])
        if trainer is trl.GRPOTrainer:  # scales its loss itself; the Trainer scales that of RLOO
            scale /= trained.args.gradient_accumulation_steps
        return torch.autograd.grad(scale * total, list(model.parameters()))

    trained = build(Watched, tmp_path, [length], steps=1, data=rows(), **options)
    trained.train()
    for inputs, added, wanted in found:
        assert inputs["sft_weights"].unique().numel() == 2 or len(found) > 1
        for one, other in zip(added, wanted, strict=True):
            torch.testing.assert_close(one, other, **NETWORK_BATCH)
    (record,) = [record for record in trained.state.log_history if "reward" in record]
    assert record["adaptive/sft_share"] == pytest.approx(1 - record["adaptive/rl_share"])
    assert record["adaptive/sft_loss"] > 0


def test_easy_prompts_learn_their_target_and_hard_ones_the_reward(tmp_path) -> None:
    """After thirty steps the model answers the easy prompt with its target, and the hard one with what pays."""
    prompts = ("restore", "nothing")
    data = rows((0.99, 0.3) * 2, prompts * 2, ("brighten", "darken") * 2)
    kind = adaptive_trainer(trl.GRPOTrainer, weighter(), FIDELITY, targets="best")

    def blurred(completions, **columns):
        return [text.split().count("blur") + 0.1 * len(text) for text in completions]

    options = {"learning_rate": 0.05, "lr_scheduler_type": "constant"}
    trained = build(kind, tmp_path, [blurred], steps=30, data=data, **options)

    def likelihoods(prompt: str) -> dict[str, float]:
        words = trained.processing_class
        logits = trained.model(torch.tensor([words(prompt)["input_ids"]])).logits[0, -1]
        return {word: logits.softmax(-1)[words(word)["input_ids"][0]].item() for word in ("brighten", "darken", "blur")}

    before = [likelihoods(prompt) for prompt in prompts]
    trained.train()
    easy, hard = (likelihoods(prompt) for prompt in prompts)
    assert all(value < 0.3 for likelihood in before for value in likelihood.values())
    assert easy["brighten"] > 0.9
    assert hard["blur"] > 0.8


def test_prompts_without_signal_learn_from_their_target_alone(tmp_path) -> None:
    """Where all completions of a prompt got the same reward, its RL weight is 0, also for additive weights."""
    batches = []

    class Watched(adaptive_trainer(trl.GRPOTrainer, weighter("additive"), FIDELITY, targets="best")):
        def compute_loss(self, model, inputs, *args, **more):
            batches.append(inputs)
            return super().compute_loss(model, inputs, *args, **more)

    def only_hard(completions, prompts, **columns):
        return [len(text) * float(prompt == "nothing") for text, prompt in zip(completions, prompts, strict=True)]

    data = rows((0.99, 0.3), ("restore", "nothing"), ("brighten",) * 2)
    trained = build(Watched, tmp_path, [only_hard], steps=1, data=data)
    trained.train()
    (record,) = [record for record in trained.state.log_history if "reward" in record]
    assert record["adaptive/rl_share"] == 0.5
    easy = (batches[0]["prompt_ids"] == trained.processing_class("restore")["input_ids"][0]).any(1)
    assert (batches[0]["advantages"][easy] == 0).all()
    assert (batches[0]["advantages"][~easy] != 0).any()
    assert (batches[0]["sft_weights"][easy] > batches[0]["sft_weights"][~easy]).all()


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("done", "done<|im_end|>"),
        ([{"role": "assistant", "content": "done"}], f"{THOUGHT}done<|im_end|>"),
        ([{"role": "assistant", "content": "", "tool_calls": [CALL]}], THOUGHT + tool_agent.SCRIPT[0]),
    ],
    ids=["text", "answer", "tool call"],
)
def test_targets_of_conversations(answer, text, tmp_path, monkeypatch) -> None:
    """A message is written as the chat template writes an answer, a text as it stands."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    batches = []

    def images(completions, environments, **columns):
        return [environment.image for environment in environments]

    reward = TRLReward(DISTANCE, images, references="clean")

    class Watched(adaptive_trainer(trl.GRPOTrainer, weighter(), reward, targets="best")):
        def compute_loss(self, model, inputs, *args, **more):
            batches.append(inputs)
            return super().compute_loss(model, inputs, *args, **more)

    columns = {"clean": [tool_agent.grey(120)] * 2, "best": [answer] * 2}
    trained = tool_agent.build(Watched, tmp_path, reward, columns, environment_factory=tool_agent.Darkroom)
    trained.train()
    for row in batches[0]["target_ids"]:
        assert trained.processing_class.decode(row[row >= 0]) == text


def test_targets_of_prompts_with_images(tmp_path) -> None:
    """A vision-language model learns its target with the image of the prompt before its eyes."""
    direct = []

    class Watched(adaptive_trainer(trl.GRPOTrainer, weighter(), FIDELITY, targets="best")):
        def compute_loss(self, model, inputs, *args, **more):
            processor, answer = self.processing_class, inputs["target_ids"][0]
            question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "restore"}]}
            text = processor.apply_chat_template([question], add_generation_prompt=True) + "done<|im_end|>"
            whole = processor(text=[text], images=[picture], return_tensors="pt")
            logs = model(**whole).logits[0].log_softmax(-1)
            direct.append(-logs[-len(answer) - 1 : -1].gather(1, answer[:, None]).mean().item())
            return super().compute_loss(model, inputs, *args, **more)

    picture = tool_agent.grey(200)
    columns = {"image": [picture] * 2, "clean": [picture] * 2, "degraded": [tool_agent.grey(80)] * 2}
    columns |= {"best": ["done"] * 2}
    trained = tool_agent.build(Watched, tmp_path, FIDELITY, columns, agent=tool_agent.viewer)
    trained.train()
    (record,) = [record for record in trained.state.log_history if "reward" in record]
    assert record["adaptive/sft_share"] == 1  # there is no signal
    assert record["adaptive/sft_loss"] == pytest.approx(direct[0], rel=1e-4)
    assert record["grad_norm"] > 0


def test_targets_beside_images_of_tools_are_refused(tmp_path) -> None:
    """TRL mixes them with the images of the prompts, so training stops."""
    picture = [tool_agent.grey(80)] * 2
    columns = {"clean": picture, "degraded": picture, "best": ["done"] * 2}
    kind = adaptive_trainer(trl.GRPOTrainer, weighter(), FIDELITY, targets="best")
    tools = {"agent": tool_agent.viewer, "tools": [tool_agent.brightened]}
    trained = tool_agent.build(kind, tmp_path, FIDELITY, columns, **tools)
    with pytest.raises(ValueError, match="no images of tools"):
        trained.train()


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ({"targets": "absent"}, "in column 'absent', got a row with .*'best'"),
        ({"targets": "best"}, "text or one message of the assistant"),
    ],
)
def test_unfit_targets_are_refused(targets, message, tmp_path) -> None:
    """A column that is not there, and a conversation of several messages."""
    several = [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]
    kind = adaptive_trainer(trl.GRPOTrainer, weighter(), FIDELITY, **targets)
    trained = build(kind, tmp_path, [length], steps=1, data=rows(targets=[several] * 4))
    with pytest.raises(ValueError, match=message):
        trained.train()


def test_resumed_runs_keep_the_anchor(tmp_path) -> None:
    """A new process that resumes measures against the model before training, not against the one it loads."""

    def trained(**resume) -> tuple[AdaptiveWeighter, dict]:
        SEEN.clear()
        first = AdaptiveWeighter(mode="convex", calibrate_on_first=True)
        kind = adaptive_trainer(trl.GRPOTrainer, first, TRLReward("gmsd", apply_operations, references="clean"))
        saving = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 0.1}
        built = build(kind, tmp_path, [length], steps=3, **saving)
        built.train(**resume)
        return first, built.state.log_history[-2]

    whole, _ = trained()
    again, record = trained(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(again.state_dict()["anchor"], whole.state_dict()["anchor"])
    (batch,) = SEEN
    distance = (-restoration_run.scores("gmsd", *batch)).view(-1, 4).nanmean(1)
    assert record["step"] == 3
    assert record["adaptive/difficulty"] == pytest.approx(distance.mean().item())
    assert record["adaptive/rl_share"] == pytest.approx(whole(distance).rl.mean().item())
