"""generate with a sentence VAE: sentences from the prior, reconstructions, and the way from one sentence to another."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from lmkit.commands.output import write_text
from lmkit.config.generation import GenerateConfig, VaeGenerateConfig
from lmkit.console import Console
from lmkit.device import Device
from lmkit.errors import ConfigError
from lmkit.generate import generate, read_prompt, warn_of_unknown
from lmkit.loading import LoadedRun
from lmkit.models.vae import GivenLatent, VaeLstm
from lmkit.rng import derive_key


def run(
    cfg: GenerateConfig, loaded: LoadedRun, prompts: list[str], device: Device, console: Console
) -> list[dict[str, Any]]:
    """Print one sentence a line, and return them.

    Without ``vae`` keys: ``num_samples`` sentences per prompt (a prompt is how they begin), each of its own latent
    vector drawn from the prior. ``vae.reconstruct`` and ``vae.interpolate_from/to`` take posterior means and always
    the most probable word.
    """
    if cfg.chat or cfg.interactive:
        raise ConfigError(f"chat has no use with {loaded.path}, which is a sentence VAE", "leave it out")
    decoder = _Decoder(cfg, loaded, device, console)
    vae = cfg.vae
    if vae.reconstruct is None and vae.interpolate_from is None:
        for prompt in dict.fromkeys(prompts):
            warn_of_unknown(loaded.tokenizer, prompt, console)
        return [
            decoder.write(prompt, index * cfg.num_samples + number, decoder.from_prior(index, number), {})
            for index, prompt in enumerate(prompts)
            for number in range(cfg.num_samples)
        ]
    if any(prompts) or cfg.num_samples > 1:
        raise ConfigError(
            "prompts and num_samples belong to sentences from the prior",
            "leave out vae.* or the prompts and num_samples",
        )
    results = []
    if vae.reconstruct is not None:
        results.append(decoder.write("", 0, decoder.mean_of(vae.reconstruct), {"reconstructs": vae.reconstruct}))
    if vae.interpolate_from is not None and vae.interpolate_to is not None:
        start_Z, end_Z = decoder.mean_of(vae.interpolate_from), decoder.mean_of(vae.interpolate_to)
        for step in range(vae.steps):
            share = step / (vae.steps - 1)
            results.append(decoder.write("", 0, torch.lerp(start_Z, end_Z, share), {"share": share}))
    return results


def refuse(cfg: GenerateConfig, loaded: LoadedRun) -> None:
    """Raise ConfigError if ``vae`` keys are given for a run that is no sentence VAE."""
    if cfg.vae != VaeGenerateConfig():
        raise ConfigError(f"vae.* has no use with {loaded.path}, which is no sentence VAE", "leave it out")


class _Decoder:
    """Writes the sentence of a latent vector."""

    def __init__(self, cfg: GenerateConfig, loaded: LoadedRun, device: Device, console: Console) -> None:
        self.cfg, self.loaded, self.device, self.console = cfg, loaded, device, console
        self.model = cast(VaeLstm, loaded.model)
        if self.model.config.d_latent == 0 and (cfg.vae.reconstruct, cfg.vae.interpolate_from) != (None, None):
            raise ConfigError(f"{loaded.path} has no latent units (model.d_latent=0)", "name another run")

    def from_prior(self, prompt: int, number: int) -> Tensor:
        """A draw that depends on the seed, the prompt's and the sample's number only."""
        generator = torch.Generator().manual_seed(derive_key(self.cfg.seed, "latent", "prior", prompt, number))
        return torch.randn(self.model.config.d_latent, generator=generator).to(self.device.torch_device)

    @torch.inference_mode()
    def mean_of(self, text: str) -> Tensor:
        """The posterior mean of a sentence."""
        tokenizer = self.loaded.tokenizer
        line = text if text.endswith("\n") else f"{text}\n"
        ids = [int(i) for i in tokenizer.encode(line)]
        warn_of_unknown(tokenizer, text, self.console)
        return self.model.encode(torch.tensor([ids], device=self.device.torch_device)).mean_BZ[0]

    def write(self, prompt: str, number: int, latent_Z: Tensor, about: dict[str, Any]) -> dict[str, Any]:
        """Write and print the sentence; ``number`` keys the draws of its words."""
        cfg = self.cfg
        sampling = replace(cfg.sampling, temperature=0.0) if about else cfg.sampling
        read = read_prompt(self.loaded.tokenizer, prompt, context=None, max_new_tokens=cfg.max_new_tokens)
        (sample,) = generate(
            GivenLatent(self.model, latent_Z),
            self.loaded.tokenizer,
            read,
            sampling=sampling,
            device=self.device,
            max_new_tokens=cfg.max_new_tokens,
            stop=["\n", *cfg.stop],
            stop_at_eos=cfg.stop_at_eos,
            seed=cfg.seed,
            prompt_index=number,
        )
        text = f"{read.text}{sample.text}".strip()
        write_text(f"{text}\n")
        return {"prompt": read.text, **about, **vars(sample), "text": text}
