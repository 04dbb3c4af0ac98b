"""The networks that engines are built from, as dfkd-generate loads them."""

from collections.abc import Iterable

from dfkd.cli.generate_options import GenerateOptions
from dfkd.cli.prepare import latent_size, load_networks, loss_scale, prepare
from dfkd.runtime import resolve_device
from dfkd.compiled.functions import OF_TEACHER, Sources
from dfkd.synthesis.run import Synthesis


def sources_of(synthesis: Synthesis) -> Sources:
    """Of a synthesis whose networks are eager."""
    guidance = synthesis.guidance
    return Sources(
        synthesis.prior,
        synthesis.teacher,
        guidance.weights if guidance else None,
        synthesis.latent_size,
        guidance.loss_scale if guidance else 1.0,
    )


def load_sources(options: GenerateOptions, networks: Iterable[str]) -> Sources:
    """What these networks are made of; a teacher is loaded only where one of them holds it. Raises UsageError."""
    if set(networks) & set(OF_TEACHER):
        return sources_of(prepare(options))
    prior = load_networks(options, resolve_device(options.device))
    return Sources(prior, None, None, latent_size(options, prior), loss_scale(options))
