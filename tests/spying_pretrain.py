"""tiny_pretrain.py that keeps each rank's inputs and the gradients of the first update."""

import os
from pathlib import Path

import tiny_pretrain  # noqa: F401, for its model
import torch

import main_pretrain
from models_mae import MaskedAutoencoderViT
from util import checkpoint, cli

seen = {"imgs": [], "noise": [], "losses": [], "saves": []}
forward = MaskedAutoencoderViT.forward
step = torch.optim.AdamW.step
save = checkpoint.save_checkpoint


def spying_forward(self, imgs, mask_ratio, noise):
    if self.training:
        seen.setdefault("weights", {k: v.clone() for k, v in self.state_dict().items()})
        seen["imgs"].append(imgs.clone())
        seen["noise"].append(noise.clone())
    seen["model"] = self
    outputs = forward(self, imgs, mask_ratio, noise)
    if self.training:
        seen["losses"].append(outputs[0].item())
    return outputs


def spying_step(self, *args, **kwargs):
    if "gradients" not in seen:
        named = seen["model"].named_parameters()
        seen["gradients"] = {n: p.grad.clone() for n, p in named if p.requires_grad}
    return step(self, *args, **kwargs)


def spying_save(path, contents):
    seen["saves"].append(str(path))
    save(path, contents)


if __name__ == "__main__":
    checkpoint.save_checkpoint = spying_save
    MaskedAutoencoderViT.forward = spying_forward
    torch.optim.AdamW.step = spying_step
    parser = main_pretrain.get_args_parser()
    cli.run(main_pretrain.main, parser)
    out_dir = Path(parser.parse_args().output_dir)
    del seen["model"]
    torch.save(seen, out_dir / f"spied-{os.environ['RANK']}.pt")
