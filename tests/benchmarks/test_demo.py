"""The demo trains what it says it trains, and fastrnn trains as torch.nn does."""

import math
import subprocess
import sys

import pytest
import torch
from torch import nn

import fastrnn
from benchmarks import demo

CELLS = ("rnn", "lstm", "gru")


@pytest.fixture(autouse=True)
def one_thread(threads):
    """As the demo itself trains; more threads are slower for a model this small."""
    threads(1)


def training(library, cell, dtype=torch.float32, seed=0):
    layer = getattr(library, cell.upper())
    return demo.Training(demo.CharacterModel(layer(36, 100), seed).to(dtype))


def frozen(cell):
    """A training that goes on without learning, with weights large enough for the state to matter."""
    trained = training(fastrnn, cell, torch.float64)
    trained.optimizer.param_groups[0]["lr"] = 0.0
    for parameter in trained.model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return trained


def test_text():
    assert len(demo.TEXT) == 263
    assert len(set(demo.TEXT)) == 36
    assert "".join(demo.VOCABULARY[index] for index in demo.CHARACTERS) == demo.TEXT


@pytest.mark.parametrize("cell", CELLS)
def test_first_loss_is_that_of_guessing(cell):
    assert training(fastrnn, cell).smoothed_loss() == pytest.approx(25 * math.log(36), abs=1e-4)


def loss_and_gradients(training):
    loss, _ = training.loss()
    return loss, torch.autograd.grad(loss, [*training.model.parameters()])


# Training is chaotic: a change of 1e-15 in one weight reaches order 1 within 15 iterations. So each iteration starts
# from the weights and the state of torch.nn. Even then rounding errors grow on their way back through 25 steps of large
# weights. Measured, relative to the largest: losses 7e-7 and gradients 2e-4 in float32, 9e-16 and 1e-13 in float64.
@pytest.mark.parametrize(
    ("dtype", "loss_tolerance", "gradient_tolerance"),
    [(torch.float32, 1e-5, 1e-2), (torch.float64, 1e-12, 1e-10)],
    ids=["float32", "float64"],
)
@pytest.mark.parametrize("cell", CELLS)
def test_first_iterations_agree_with_torch(cell, dtype, loss_tolerance, gradient_tolerance):
    ours, theirs = (training(library, cell, dtype) for library in (fastrnn, nn))
    for _ in range(30):
        ours.model.load_state_dict(theirs.model.state_dict())
        ours.iteration, ours.state = theirs.iteration, theirs.state
        (loss, gradients), (expected_loss, expected_gradients) = map(loss_and_gradients, (ours, theirs))
        torch.testing.assert_close(loss, expected_loss, rtol=loss_tolerance, atol=0)
        for gradient, expected in zip(gradients, expected_gradients, strict=True):
            assert (gradient - expected).abs().max() <= gradient_tolerance * expected.abs().max()
        theirs.iterate()


@pytest.mark.parametrize("cell", CELLS)
def test_state_is_carried_until_the_text_starts_over(cell):
    """Without learning, chunks read one after the other score as one long chunk does."""
    trained = frozen(cell)
    losses = []
    for _ in range(11):
        losses.append(trained.loss()[0].item())
        trained.iterate()
    logits, _ = trained.model(demo.CHARACTERS[:250], None)
    whole = nn.functional.cross_entropy(logits, demo.CHARACTERS[1:251], reduction="none").view(10, 25).sum(1)
    assert losses[:10] == pytest.approx(whole.tolist(), rel=1e-10)
    assert losses[10] == losses[0]


def test_gradients_are_clipped():
    trained = training(fastrnn, "rnn")
    with torch.no_grad():
        trained.model.output.bias[0] = 1000.0
    trained.iterate()
    largest = max(parameter.grad.abs().max().item() for parameter in trained.model.parameters())
    assert largest == 5.0


def test_rnn_learns():
    """From 89.6 to below 60 in 1500 iterations; eight seeds came to between 29 and 46."""
    trained = training(fastrnn, "rnn")
    for _ in range(1500):
        trained.iterate()
    assert trained.average < 60


def test_sampling_and_reporting_do_not_disturb_training():
    watched, alone = (training(fastrnn, "lstm") for _ in range(2))
    for _ in range(3):
        reported = watched.smoothed_loss()
        text = watched.sample(torch.Generator().manual_seed(0))
        assert len(text) == 200
        assert set(text) <= set(demo.TEXT)
        watched.iterate()
        alone.iterate()
        assert watched.average == alone.average == pytest.approx(reported, rel=1e-7)


def test_sample_continues_the_text():
    """The first character written after one chunk is drawn from the scores of a model that has read the text so far."""
    trained = frozen("rnn")
    trained.iterate()
    logits, _ = trained.model(demo.CHARACTERS[:26], None)
    probabilities = logits[25].softmax(0)
    for seed in range(20):
        expected = torch.multinomial(probabilities, 1, generator=torch.Generator().manual_seed(seed))
        assert trained.sample(torch.Generator().manual_seed(seed), 1) == demo.VOCABULARY[expected]


def run_command(*arguments):
    command = [sys.executable, "-m", "benchmarks.demo", *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("cell", CELLS)
def test_command_line(cell):
    done = run_command("--cell", cell, "--iterations", "12", "--hidden", "8", "--seed", "3", "--no-benchmark")
    assert done.returncode == 0, done.stderr
    assert "Iteration 0 (loss: 89.5" in done.stdout
    assert "Iteration 12 (loss: " in done.stdout
    assert "times as fast as" in done.stdout


def test_command_line_rejects_nonsense():
    done = run_command("--iterations", "none")
    assert done.returncode == 2
    assert "'none' is not a positive whole number" in done.stderr


def test_not_learning_fails(monkeypatch, capsys):
    monkeypatch.setattr(demo, "LECTURE", {0: demo.UNIFORM_LOSS, 2: 0.0})
    assert demo.main(["--iterations", "2", "--hidden", "2"]) == 1
    assert "FAILED: the loss fell to 89." in capsys.readouterr().err


def test_benchmark_follows_with_the_default_threads(monkeypatch, threads):
    calls = []
    threads(2)
    monkeypatch.setattr(
        "benchmarks.__main__.main", lambda arguments: calls.append((arguments, torch.get_num_threads())) or 7
    )
    assert demo.main(["--iterations", "2", "--hidden", "2"]) == 7
    assert calls == [(["--suite", "quick"], 2)]
