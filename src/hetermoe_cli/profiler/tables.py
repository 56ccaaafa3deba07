"""Kernel tables as files keep them: rounded figures, and the merge of new tables with an earlier file. No torch."""

from hetermoe_cli.spec.profile import KernelTable, Profile


def rounded(seconds: float) -> float:
    """Five significant digits keep the files readable; a clock tells no more."""
    return float(f"{seconds:.5g}")


def merge(old: Profile | None, new: Profile) -> tuple[Profile, str]:
    """`new`, with the tables of `old` that it does not replace; and what was done with `old`, in words ("" if nothing).

    Only measurements of the same product merge: a modelled file, or another machine's, is replaced as a whole.
    """
    if old is None:
        return new, ""
    if old.source != "measured":
        return new, f"the {old.source} profile was replaced as a whole: it does not mix with measured tables"
    if (old.accelerator, old.facts.product) != (new.accelerator, new.facts.product):
        return new, f"the profile of another product ({old.facts.product or old.accelerator}) was replaced as a whole"
    taken = {_key(table) for table in new.tables}
    kept = [table for table in old.tables if _key(table) not in taken]
    replaced = len(old.tables) - len(kept)
    note = f"{replaced} tables replaced, {len(kept)} kept"
    if kept and old.software != new.software:
        note += f" (measured with {', '.join(f'{k} {v}' for k, v in old.software.items())})"
    return new.model_copy(update={"tables": kept + new.tables}), note


def _key(table: KernelTable) -> tuple[object, str]:
    return table.shape, table.precision
