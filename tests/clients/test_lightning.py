"""A training loop of PyTorch Lightning: the same losses before and after `convert`."""

import copy

import pytest
import torch

lightning = pytest.importorskip("lightning.pytorch")

from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging  # noqa: E402
from lightning.pytorch.utilities.model_summary import ModelSummary  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402
from twins import assert_same  # noqa: E402

import fastrnn  # noqa: E402

# All comparisons but that of autocast are in float32 within twins.TOLERANCE: both sides add the same products, in
# another order. Adam would make steps of gradients that are nothing but roundings, 1e-8, which its eps prevents.


class Tagger(lightning.LightningModule):
    """Says of each step of a sequence whether the step before was positive."""

    def __init__(self, rnn: str = "LSTM"):
        super().__init__()
        self.rnn = getattr(torch.nn, rnn)(3, 16, num_layers=2, batch_first=True, dropout=0.2)
        self.head = torch.nn.Linear(16, 1)
        self.example_input_array = torch.zeros(2, 5, 3)
        self.losses = {"train": [], "val": []}

    def forward(self, x):
        return self.head(self.rnn(x)[0]).squeeze(-1)

    def _loss(self, batch, name):
        x, y = batch
        loss = F.binary_cross_entropy_with_logits(self(x).float(), y)
        self.log(f"{name}_loss", loss)
        self.losses[name].append(loss.detach())
        return loss

    def training_step(self, batch, _):
        return self._loss(batch, "train")

    def validation_step(self, batch, _):
        self._loss(batch, "val")

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.03, eps=1e-5)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.8)]


def batches() -> DataLoader:
    """Always the same; the last batch is smaller."""
    x = torch.randn(60, 12, 3, generator=torch.Generator().manual_seed(2))
    return DataLoader(TensorDataset(x, (x[..., 0] > 0).float().roll(1, 1)), batch_size=8)


def trained(model: Tagger, path, *, epochs: int = 3, ckpt_path=None, callbacks: tuple[Callback, ...] = (), **options):
    """The trainer, after `model` learned until epoch `epochs`."""
    lightning.seed_everything(1, verbose=False)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", default_root_dir=path, callbacks=list(callbacks), **quiet, **options
    )
    trainer.fit(model, batches(), batches(), ckpt_path=ckpt_path)
    return trainer


def twins_of(rnn: str = "LSTM") -> list[Tagger]:
    """Ours and torch.nn's, with equal parameters."""
    theirs = Tagger(rnn)
    ours = fastrnn.convert(copy.deepcopy(theirs))
    assert (type(ours.rnn), type(theirs.rnn)) == (getattr(fastrnn, rnn), getattr(torch.nn, rnn))
    return [ours, theirs]


@pytest.mark.parametrize("rnn", ["LSTM", "GRU", "RNN"])
def test_losses(rnn, tmp_path):
    """With dropout, clipped gradients and accumulation over two batches."""
    ours, theirs = twins_of(rnn)
    for model in (ours, theirs):
        trained(model, tmp_path, gradient_clip_val=0.5, accumulate_grad_batches=2, enable_checkpointing=False)
    assert len(theirs.losses["train"]) == 24
    assert theirs.losses["train"][-1] < theirs.losses["train"][0] - 0.05
    assert_same(ours.losses, theirs.losses, torch.float32)
    assert_same(dict(ours.state_dict()), dict(theirs.state_dict()), torch.float32)


def test_checkpoint_of_one_goes_on_with_the_other(tmp_path):
    """A converted model's checkpoint is one of torch.nn's, with the optimiser's state, and the other way round."""
    ours, theirs = twins_of()
    for name, model in (("ours", ours), ("theirs", theirs)):
        trained(model, tmp_path, epochs=1, enable_checkpointing=False).save_checkpoint(tmp_path / f"{name}.ckpt")
    fresh = Tagger.load_from_checkpoint(tmp_path / "ours.ckpt")
    assert type(fresh.rnn) is torch.nn.LSTM
    assert_same(dict(fresh.state_dict()), dict(theirs.state_dict()), torch.float32)
    finals = []
    for model, checkpoint in ((Tagger(), "ours"), (fastrnn.convert(Tagger()), "theirs")):
        trained(model, tmp_path, epochs=2, ckpt_path=tmp_path / f"{checkpoint}.ckpt", enable_checkpointing=False)
        assert len(model.losses["train"]) == 8
        finals.append(dict(model.state_dict()))
    assert_same(*finals, torch.float32)


def test_callback_that_copies_the_model(tmp_path):
    ours, theirs = twins_of()
    for model in (ours, theirs):
        average = StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=1)
        trained(model, tmp_path, callbacks=(average,), enable_checkpointing=False)
    assert type(ours.rnn) is fastrnn.LSTM
    assert_same(ours.losses, theirs.losses, torch.float32)
    assert_same(dict(ours.state_dict()), dict(theirs.state_dict()), torch.float32)


def test_autocast(tmp_path):
    """Against torch.nn in float32, since its own LSTM runs in bfloat16 on some CPUs only. bfloat16 has 8 bits, so the
    losses differ by about 1e-3, and fall by 0.1."""
    ours, theirs = twins_of()
    for model, precision in ((ours, "bf16-mixed"), (theirs, "32-true")):
        trained(model, tmp_path, precision=precision, enable_checkpointing=False)
    torch.testing.assert_close(ours.losses, theirs.losses, rtol=0.02, atol=0)


def test_summary():
    """It knows the sizes of inputs and outputs, from hooks, and the class by its name, which is torch.nn's. (It
    counts more FLOPs: torch has no count of those of its own LSTM.)"""
    ours, theirs = (ModelSummary(model, max_depth=-1) for model in twins_of())
    assert "LSTM" in str(ours)
    for name in ("layer_names", "layer_types", "param_nums", "in_sizes", "out_sizes"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert ours.total_flops > theirs.total_flops
