"""Pretrain a GPT with StoSignSGD in FP8 and watch its optimizer states, from the command line.

    python examples/pretrain_gpt.py fit --config examples/pretrain_gpt.yaml
    python examples/pretrain_gpt.py fit --config examples/pretrain_gpt.yaml --model.stosign.lr 0.001
    python examples/pretrain_gpt.py fit --config examples/pretrain_gpt.yaml \
        --ckpt_path runs/gpt-1m/version_0/checkpoints/last.ckpt

The last line resumes an interrupted run; it ends with the weights of an uninterrupted one, bit for bit.
`tensorboard --logdir runs` shows the loss and the health of the optimizer states at http://localhost:6006/#custom_scalars
"""

from gpt import GPTModule
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from text_data import TextDataModule


class PretrainCLI(LightningCLI):
    """LightningCLI that gives the model the context length of the data."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("data.context", "model.context")


def main(args: ArgsType = None) -> LightningCLI:
    """Run the command line `args` (default: `sys.argv`) and return the CLI, with its trainer, model and data."""
    return PretrainCLI(
        GPTModule,
        TextDataModule,
        seed_everything_default=0,
        # Pretraining is counted in steps: an epoch can be minutes or weeks.
        trainer_defaults={"max_steps": 1000, "val_check_interval": 100, "check_val_every_n_epoch": None},
        auto_configure_optimizers=False,
        args=args,
    )


if __name__ == "__main__":
    main()
