"""CollapseControl, and the limits of /sys/kernel/mm/transparent_hugepage/khugepaged."""

from __future__ import annotations

from dataclasses import dataclass, field

from pykhuge.hw.memory import HPAGE_PMD_NR

__all__ = ["CollapseControl", "KhugepagedSettings"]


@dataclass
class KhugepagedSettings:
    """max_ptes_none, max_ptes_swap, max_ptes_shared: 0..511 each, inclusive limits of the daemon."""

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

    def find_target_node(self) -> int:
        """hpage_collapse_find_target_node(): the first of the nodes with most pages."""
        return min(self.alloc_nmask(), default=0)

    def alloc_nmask(self) -> set[int]:
        """All nodes with as many pages as the one with most; any of them will do."""
        most = max(self.node_load.values(), default=0)
        return {nid for nid, load in self.node_load.items() if load == most}
