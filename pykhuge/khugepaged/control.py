"""CollapseControl, and the limits of /sys/kernel/mm/transparent_hugepage/khugepaged."""

from __future__ import annotations

from dataclasses import dataclass, field

from pykhuge.hw.memory import HPAGE_PMD_NR

__all__ = ["CollapseControl", "KhugepagedSettings"]


@dataclass
class KhugepagedSettings:
    """max_ptes_none, _swap, _shared: the daemon's limits, inclusive, 0..511 each."""

    max_ptes_none: int = HPAGE_PMD_NR - 1
    max_ptes_swap: int = HPAGE_PMD_NR // 8
    max_ptes_shared: int = HPAGE_PMD_NR // 2
    pages_collapsed: int = 0

    def __setattr__(self, name: str, value: int) -> None:
        if name.startswith("max_ptes_") and not 0 <= value < HPAGE_PMD_NR:
            raise ValueError(f"{name}={value}: allowed 0..{HPAGE_PMD_NR - 1}")
        if name not in KhugepagedSettings.__dataclass_fields__:
            raise AttributeError(
                f"{name}: allowed {', '.join(KhugepagedSettings.__dataclass_fields__)}"
            )
        object.__setattr__(self, name, value)


@dataclass
class CollapseControl:
    """struct collapse_control: on whose behalf a block is collapsed.

    The daemon heeds its limits and `enabled`; MADV_COLLAPSE heeds neither.
    node_load: pages of the block by node, as far as the scan came.
    """

    is_khugepaged: bool
    settings: KhugepagedSettings
    node_load: dict[int, int] = field(default_factory=dict)

    def limit(self, name: str) -> int:
        """How many PTEs of a kind may pass: max_ptes_* for the daemon, all for MADV_COLLAPSE."""
        return int(getattr(self.settings, name)) if self.is_khugepaged else HPAGE_PMD_NR

    def find_target_node(self) -> tuple[int, set[int]]:
        """hpage_collapse_find_target_node(): the first node with most pages, and cc->alloc_nmask.

        The mask holds all nodes with as many pages; any of them will do.
        """
        most = max(self.node_load.values(), default=0)
        mask = {nid for nid, load in self.node_load.items() if load == most}
        return min(mask, default=0), mask
