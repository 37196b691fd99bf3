"""The monitor's records outside Lightning: in plain torch, and in Hugging Face's own Trainer."""

import pytest
import torch
from torch import nn

from lightning_stosign import OptimizerStateLogger, StoSignSGD


class Written:
    def __init__(self):
        self.rows = []

    def add_scalar(self, tag, value, step):
        self.rows.append((tag, value, step))


def train(optimizer_of, logger_of, steps):
    torch.manual_seed(0)
    model = nn.Linear(64, 64)
    optimizer, written = optimizer_of(model.parameters()), Written()
    logger = logger_of(written, model)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(2, 64)).square().mean().backward()
        optimizer.step()
        logger.step(optimizer)
    return optimizer, written.rows


def test_plain_loop_records_every_nth_step_what_the_states_are():
    optimizer, rows = train(
        lambda params: torch.optim.AdamW(params), lambda w, model: OptimizerStateLogger(w, 3, names=model), steps=7
    )
    assert {step for *_, step in rows} == {3, 6}
    last = {tag: value for tag, value, step in rows if step == 6}
    _, seventh = train(
        lambda params: torch.optim.AdamW(params), lambda w, model: OptimizerStateLogger(w, 7, names=model), steps=7
    )
    state = optimizer.state[optimizer.param_groups[0]["params"][0]]["exp_avg_sq"]
    recorded = {tag: value for tag, value, _ in seventh}
    assert recorded["per_layer_zero_fraction/exp_avg_sq/weight"] == float((state == 0).float().mean())
    assert recorded["per_layer_abs_max/exp_avg_sq/weight"] == float(state.abs().max())
    assert last.keys() == recorded.keys()


def test_parameters_go_by_the_optimizers_names_or_their_number():
    named = [("first", nn.Parameter(torch.ones(3))), ("second", nn.Parameter(torch.ones(3)))]
    for params, expected in ((named, "first"), ([param for _, param in named], "parameter 0")):
        optimizer, written = StoSignSGD(params), Written()
        for _, param in named:
            param.grad = torch.ones(3)
        optimizer.step()
        OptimizerStateLogger(written, 1).step(optimizer)
        assert f"per_layer_abs_max/exp_avg/{expected}" in {tag for tag, *_ in written.rows}


@pytest.mark.parametrize("bad", [{"every_n_steps": 0}, {"every_n_steps": True}, {"forecast": ["fp9"]}], ids=str)
def test_bad_argument_is_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad)).replace("forecast", "fp9")):
        OptimizerStateLogger(Written(), **bad)


@pytest.fixture
def trainer_of(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    def make(states, steps=8, callbacks=None, **options):
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
        )
        model = transformers.LlamaForCausalLM(config)
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(64, (64, 16), generator=generator)
        data = [{"input_ids": row, "labels": row} for row in tokens]
        args = transformers.TrainingArguments(
            tmp_path, max_steps=steps, per_device_train_batch_size=4, logging_steps=2, report_to=[], use_cpu=True,
            save_strategy="no", disable_tqdm=True, **options,
        )  # fmt: skip
        optimizer = StoSignSGD(model.parameters(), lr=1e-3, state_precision=states)
        return transformers.Trainer(model, args, train_dataset=data, optimizers=(optimizer, None), callbacks=callbacks)

    return make


def records_of(trainer, tag):
    return [entry[f"optimizer_state/{tag}"] for entry in trainer.state.log_history if f"optimizer_state/{tag}" in entry]


@pytest.mark.parametrize("attached", [True, False])
def test_hugging_faces_trainer_logs_the_states(trainer_of, attached):
    from lightning_stosign import OptimizerStateCallback

    callback = OptimizerStateCallback()
    trainer = trainer_of("fp8", callbacks=None if attached else [callback])
    if attached:
        callback.attach(trainer)
    trainer.train()
    assert len(records_of(trainer, "zero_fraction/exp_inf")) == 4
    assert all(0 <= value < 0.5 for value in records_of(trainer, "zero_fraction/exp_inf"))


def test_hugging_faces_trainer_stops_at_a_collapse(trainer_of):
    from lightning_stosign import OptimizerStateCallback

    trainer = trainer_of("fp8-raw:min_numel=1", steps=40)
    OptimizerStateCallback(1, action="stop", max_zero_fraction=0.01).attach(trainer)
    trainer.train()
    assert trainer.state.global_step == 3  # the third record in a row


@pytest.mark.parametrize("bad", [{"action": "shout"}, {"patience": 0}, {"max_zero_fraction": 2}], ids=str)
def test_bad_argument_of_the_callback_is_refused(bad):
    pytest.importorskip("transformers")
    from lightning_stosign import OptimizerStateCallback

    with pytest.raises(ValueError, match=next(iter(bad))):
        OptimizerStateCallback(**bad)
