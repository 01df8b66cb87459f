"""Naming: which tissue a token looks like, and which tissue a mixture component therefore is.

Names come from HU rules with cut points from the literature or from the scan itself, never from labels. The cut
points live in ``lungseg.tissue``; METHOD 1.6 holds the rules. Statistics of the tokens come from ``density``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from lungseg import tissue as cut
from lungseg.errors import MismatchError
from lungseg.segmentation.density import TokenStatistics, healthy_mode_hu, local_sd, smooth_hu, token_statistics
from lungseg.tissue import MIXTURE_TISSUES, TISSUES, UNCLASSIFIED, Tissue

__all__ = [
    "ComponentName",
    "TokenStatistics",
    "healthy_mode_hu",
    "local_sd",
    "name_components",
    "name_tokens",
    "renumbered",
    "smooth_hu",
    "tissue_posterior",
    "token_statistics",
]

NamingRule = Literal["votes", "mean-hu", "mean-hu-adaptive"]


@dataclass(frozen=True)
class ComponentName:
    """The tissue of one mixture component, and why."""

    component: int
    """Index of the component in the fit whose posterior it names."""
    tissue: Tissue
    rule: str
    """The rule that fired, in words."""
    votes: Mapping[Tissue, float]
    """Share of the component's (responsibility-weighted) members of each name; sum 1, or 0 without members."""
    weight: float
    """Share of all tokens."""
    mean_hu: float
    """Responsibility-weighted mean of the members' mean HU; NaN without members, as all below."""
    median_hu: float
    """Weighted median of the members' medians."""
    p25_hu: float
    """Weighted median of the members' 25th percentiles."""
    p75_hu: float
    """Weighted median of the members' 75th percentiles."""
    laa950_share: float
    """Weighted mean, 0 to 1."""
    local_sd_hu: float
    """Weighted median of the members' median local standard deviations."""
    dense_share: float
    """Weighted mean share of voxels above -200 HU, 0 to 1: high in vessels."""


def name_tokens(stats: TokenStatistics, *, healthy_mode_hu: float) -> np.ndarray:
    """Tissue of each token by the HU rules, the first that fires.

    1. LAA-950 share at least 10 %, or median at least 60 HU below the scan's healthy mode: emphysema.
    2. Median at or below -700: healthy.
    3. Median at or above -300: consolidation, unless the 25th percentile is at or below -700: a dense body over an
       aerated floor is a vessel, an airway wall or an edge, not infiltrated lung: healthy.
    4. Else, if the 25th percentile is at or below the scan's healthy mode, a quarter of the window is plain healthy
       lung and vessels or edges raise the rest: healthy.
    5. Else by texture: median local SD (beyond the noise of the scan) above 120 HU is fibrosis, otherwise ground
       glass.

    The median decides where METHOD says so; the 25th percentile ("floor of the parenchyma") only takes back what
    vessels did to the median. It is not used for emphysema (noise lowers it) nor as the only density (the air of
    honeycombs lowers it below -700).

    Parameters
    ----------
    stats : TokenStatistics
        Of N tokens of one scan.
    healthy_mode_hu : float
        From ``healthy_mode_hu`` of the same scan.

    Returns
    -------
    uint8 array, shape (N,)
        ``Tissue`` ids; 255 (unclassified) for tokens without lung voxels.

    Source
    ------
    METHOD 1.6; FEASIBILITY failure modes 1-3.
    """
    emphysema = (stats.laa950_share >= cut.LAA950_EMPHYSEMA_SHARE) | (
        stats.median_hu <= healthy_mode_hu - cut.EMPHYSEMA_BELOW_HEALTHY_MODE_HU
    )
    dense = stats.median_hu >= cut.CONSOLIDATION_MEDIAN_HU
    healthy = (
        (stats.median_hu <= cut.HEALTHY_MEDIAN_HU)
        | (dense & (stats.p25_hu <= cut.HEALTHY_MEDIAN_HU))
        | (stats.p25_hu <= healthy_mode_hu)
    )
    texture_cut = cut.FIBROSIS_LOCAL_SD_HU
    plain = healthy & ~emphysema & (stats.median_hu <= cut.HEALTHY_MEDIAN_HU) & (stats.num_voxels > 0)
    if plain.any():
        own = cut.FIBROSIS_TO_HEALTHY_TEXTURE * float(np.median(stats.local_sd_median[plain]))
        texture_cut = min(texture_cut, own)
    conditions = [
        stats.num_voxels == 0,
        emphysema,
        healthy,
        dense,
        stats.local_sd_median > texture_cut,
    ]
    names = [UNCLASSIFIED, Tissue.EMPHYSEMA, Tissue.HEALTHY, Tissue.CONSOLIDATION, Tissue.FIBROSIS]
    return np.select(conditions, [np.uint8(name) for name in names], default=np.uint8(Tissue.GGO)).astype(np.uint8)


def name_components(
    responsibilities: np.ndarray, token_names: np.ndarray, stats: TokenStatistics, *, rule: NamingRule = "votes"
) -> list[ComponentName]:
    """Name each component of a mixture by what its members look like.

    Parameters
    ----------
    responsibilities : float array, shape (N, K)
        Posterior of the components given the tokens of the fit sample.
    token_names : uint8 array, shape (N,)
        From ``name_tokens``; tokens named 255 do not count.
    stats : TokenStatistics
        Of the same tokens.
    rule : str
        ``votes``: the name with most responsibility-weighted members (a tie goes to the first of
        ``MIXTURE_TISSUES``). ``mean-hu``: the tissue whose prototype is nearest to the mean HU (the paper's text).
        ``mean-hu-adaptive``: the authors' script, with percentile ranks among the members' medians.

    Returns
    -------
    list of ComponentName
        K of them, by increasing mean HU (components without members last), each with its index in
        ``responsibilities``: ``fit.reorder([n.component for n in names])`` with ``renumbered(names)`` go together.

    Raises
    ------
    MismatchError
        If the lengths differ or no token holds lung.

    Source
    ------
    METHOD 1.6.
    """
    if not responsibilities.shape[0] == len(token_names) == len(stats):
        raise MismatchError(
            f"{responsibilities.shape[0]} responsibilities, {len(token_names)} names and {len(stats)} statistics "
            "do not belong to the same tokens"
        )
    valid = (token_names != UNCLASSIFIED) & (stats.num_voxels > 0)
    if not valid.any():
        raise MismatchError(f"none of {len(token_names)} tokens holds lung: nothing to name components by")
    weights = responsibilities[valid].astype(np.float64)
    members = _Members(stats, valid)
    one_hot = token_names[valid, None] == np.asarray(MIXTURE_TISSUES, dtype=np.uint8)
    shares = weights.sum(axis=0) / weights.sum()
    named = []
    for k, share in enumerate(shares):
        described = members.describe(k, weights[:, k], one_hot, float(share))
        name, reason = _decide(described, members, rule)
        named.append(replace(described, tissue=name, rule=reason))
    return sorted(named, key=lambda item: (np.isnan(item.mean_hu), item.mean_hu, item.component))


def renumbered(names: Sequence[ComponentName]) -> list[ComponentName]:
    """The names for a fit reordered by them: component i is the i-th name."""
    return [replace(name, component=i) for i, name in enumerate(names)]


def tissue_posterior(posterior: np.ndarray, names: Sequence[ComponentName]) -> np.ndarray:
    """Posterior per tissue: the sum over the components of that name.

    Parameters
    ----------
    posterior : float array, shape (K, ...)
        Per component, in the order of the fit.
    names : sequence of ComponentName
        One for each component, in any order.

    Returns
    -------
    float32 array, shape (5, ...)
        In the order of ``MIXTURE_TISSUES``; a tissue without component is zero.

    Raises
    ------
    MismatchError
        If the names are not those of the K components.
    """
    if sorted(name.component for name in names) != list(range(posterior.shape[0])):
        raise MismatchError(f"{len(names)} names do not fit a posterior of {posterior.shape[0]} components")
    result = np.zeros((len(MIXTURE_TISSUES), *posterior.shape[1:]), dtype=np.float32)
    for name in names:
        result[MIXTURE_TISSUES.index(name.tissue)] += posterior[name.component]
    return result


class _Members:
    """Statistics of the tokens with lung, sorted once for the weighted medians of every component."""

    def __init__(self, stats: TokenStatistics, valid: np.ndarray) -> None:
        self.stats = stats
        self.valid = valid
        medians = stats.median_hu[valid].astype(np.float64)
        self.scan_order = np.argsort(medians, kind="stable")
        self.scan_medians = medians[self.scan_order]
        self.scan_share = np.cumsum(stats.num_voxels[valid][self.scan_order], dtype=np.float64)
        self.scan_share /= self.scan_share[-1]

    def describe(self, component: int, weight: np.ndarray, one_hot: np.ndarray, share: float) -> ComponentName:
        """Votes and statistics of one component; tissue and rule are still to be decided."""
        total = float(weight.sum())
        votes = (weight @ one_hot) / total if total > 0 else np.zeros(len(MIXTURE_TISSUES))

        def mean(values: np.ndarray) -> float:
            return float(weight @ values[self.valid]) / total if total > 0 else float("nan")

        def median(values: np.ndarray) -> float:
            return _weighted_median(values[self.valid], weight)

        return ComponentName(
            component=component,
            tissue=Tissue.HEALTHY,
            rule="",
            votes={name: float(vote) for name, vote in zip(MIXTURE_TISSUES, votes, strict=True)},
            weight=share,
            mean_hu=mean(self.stats.mean_hu),
            median_hu=median(self.stats.median_hu),
            p25_hu=median(self.stats.p25_hu),
            p75_hu=median(self.stats.p75_hu),
            laa950_share=mean(self.stats.laa950_share),
            local_sd_hu=median(self.stats.local_sd_median),
            dense_share=mean(self.stats.dense_share),
        )

    def rank(self, hu: float) -> float:
        """Share of the sample's lung voxels in tokens whose median is below ``hu``."""
        position = int(np.searchsorted(self.scan_medians, hu, side="left"))
        return float(self.scan_share[position - 1]) if position else 0.0


def _decide(described: ComponentName, members: _Members, rule: NamingRule) -> tuple[Tissue, str]:
    """Tissue of a component and the rule that fired, in words."""
    if np.isnan(described.mean_hu):
        return Tissue.HEALTHY, "no members in the sample: healthy by default"
    if rule == "votes":
        name = max(MIXTURE_TISSUES, key=lambda tissue: described.votes[tissue])
        return name, f"{100 * described.votes[name]:.0f} % of the members' votes"
    if rule == "mean-hu":
        name = min(MIXTURE_TISSUES, key=lambda tissue: abs(described.mean_hu - _prototype(tissue)))
        return name, f"mean {described.mean_hu:.0f} HU is nearest to the prototype {_prototype(name):.0f} HU"
    if rule == "mean-hu-adaptive":
        return _adaptive(described, members.rank(described.median_hu))
    raise MismatchError(f"unknown naming rule '{rule}'")


def _adaptive(described: ComponentName, rank: float) -> tuple[Tissue, str]:
    """The authors' rule: absolute cuts first, then the rank of the median within the sample (METHOD 1.6 [C])."""
    median = described.median_hu
    where = f"median {median:.0f} HU"
    if median < cut.PAPER_CODE_EMPHYSEMA_BELOW_HU:
        return Tissue.EMPHYSEMA, f"{where} below {cut.PAPER_CODE_EMPHYSEMA_BELOW_HU:.0f}"
    if median >= cut.PAPER_CODE_CONSOLIDATION_HU:
        return Tissue.CONSOLIDATION, f"{where} at or above {cut.PAPER_CODE_CONSOLIDATION_HU:.0f}"
    where += f", rank {100 * rank:.0f} %"
    if rank <= 0.25:
        low = median < cut.PAPER_CODE_LOW_QUARTER_HU
        return (Tissue.EMPHYSEMA if low else Tissue.GGO), f"{where}: lowest quarter of the sample"
    if rank <= 0.5:
        return Tissue.GGO, f"{where}: second quarter of the sample"
    if rank <= 0.75:
        fibrous = described.p75_hu > cut.PAPER_CODE_FIBROSIS_HU
        reason = f"{where}, 75th percentile {described.p75_hu:.0f} HU: third quarter of the sample"
        return (Tissue.FIBROSIS if fibrous else Tissue.HEALTHY), reason
    reason = f"{where}: highest quarter of the sample"
    if median > cut.PAPER_CODE_DENSE_QUARTER_HU:
        return Tissue.CONSOLIDATION, reason
    return (Tissue.FIBROSIS if median > cut.PAPER_CODE_FIBROSIS_HU else Tissue.HEALTHY), reason


def _prototype(tissue: Tissue) -> float:
    """Prototype HU of a mixture tissue."""
    value = TISSUES[tissue].prototype_hu
    assert value is not None
    return value


def _weighted_median(values: np.ndarray, weight: np.ndarray) -> float:
    """Smallest value at which half of the weight is reached; NaN without weight."""
    total = float(weight.sum())
    if total <= 0:
        return float("nan")
    order = np.argsort(values, kind="stable")
    position = int(np.searchsorted(np.cumsum(weight[order]), total / 2.0))
    return float(values[order[min(position, len(order) - 1)]])
