"""The small comparison of votes."""

import torch
from vote_rates import IS_VECTOR, METHODS, Method, main, train, weights

TEXT = torch.frombuffer(bytearray(b"to be or not to be, that is the question " * 20), dtype=torch.uint8)


def test_worker_that_votes_alone_is_ddp(monkeypatch):
    monkeypatch.setattr("vote_rates.WORKERS", 1)
    losses = [train(Method(name, 0.01), [0.01, 0.02], 5, TEXT, TEXT) for name in ("none", "mean", "majority")]
    assert losses[0].shape == (2, 3)
    assert torch.allclose(losses[1], losses[0], rtol=1e-3) and torch.allclose(losses[2], losses[0], rtol=0.05)


def test_one_local_step_is_none_and_more_are_some():
    one, two = (train(Method("mean", 0.01, local_steps=k), [0.01], 4, TEXT, TEXT) for k in (1, 2))
    assert not torch.allclose(one, two) and bool((two < 6).all())
    assert int(IS_VECTOR.sum()) == 320 and len(weights(0)) == len(IS_VECTOR)


def test_result_is_kept_and_not_measured_again(tmp_path, capsys):
    for _ in range(2):
        main(["votes mean"], steps=1, results=tmp_path / "rates.txt")
    assert len((tmp_path / "rates.txt").read_text().splitlines()) == 2  # the command and its result
    assert capsys.readouterr().out.startswith("votes mean, 1 steps: ") and "votes mean" in METHODS
