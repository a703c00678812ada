"""What the words and columns of a report mean, said where they first stand."""

import re
from dataclasses import replace

from jointq_cli.report.tables.table import TableDocument, TextTable

MEANINGS = {
    "E_y": "relative error of a layer's output on the calibration tokens, |(W - W_q) X|² / |W X|²; W is the weight "
    "that was solved for, with QEP the corrected one",
    "accumulated": "|quantised - original|² / |original|² of what leaves a block, with all blocks up to it quantised, "
    "on the first batch of calibration windows",
    "increase": "of the perplexity against the original's, ± the standard error of the paired difference",
    "E_w": "relative error of a layer's weight, |W - W_q|² / |W|²",
    "damping": "fraction of the Hessian's mean diagonal that is added to its diagonal, so that it can be factorised",
    "lambda": "weight λ of the regularisation R in JointQ's objective e (H + λ R) eᵀ; a larger one keeps closer to the "
    "weight and less close to the output on the calibration tokens",
    "turned": "codes and scales are those of the weight in a random basis of its input, which few packed formats hold; "
    "the checkpoint has it turned back",
    "alpha": "share of QEP's correction for the quantised inputs that is applied",
    "residual": "share of the error in the residual stream that QEP's correction makes up for",
    "beta": "share of QEP's correction for the residual stream that is applied",
    "start_error": "JointQ's objective where its search began, relative to that of a weight of zeros",
    "final_error": "JointQ's objective where its search ended, relative to that of a weight of zeros",
    "sweeps": "how many times JointQ went through all groups",
    "flips_per_weight": "steps of codes in these sweeps",
    "dead_columns": "inputs that are zero on all calibration tokens",
    "min_condition": "lower bound of the condition number of the Hessian as it was factorised",
    "loss_error": "E_y with outputs weighted by what they matter to the loss",
    "refined_codes": "share of the codes that the refinement has changed",
    "refined_scales": "share of the scales that the refinement has changed",
    "tokens": "calibration tokens that are routed to the expert",
}


def explained(document: TableDocument) -> TableDocument:
    """With the meaning of each word: those of the title in a paragraph, those of a table in its note."""
    said: set[str] = set()

    def meanings(*texts: str) -> str:
        words = {*texts, *re.findall(r"\w+(?==)|E_[yw]|\bturned\b", " ".join(texts))}
        new = [word for word in MEANINGS if word in words - said]
        said.update(new)
        return "\n".join(f"{word}: {MEANINGS[word]}." for word in new)

    def noted(table: TextTable) -> TextTable:
        found = meanings(table.title, *table.heading, table.note) if table.rows else ""
        return replace(table, note="\n".join(filter(None, [table.note, found])))

    title = meanings(document.title)
    first = [noted(table) for table in document.first_tables]
    tables = [noted(table) for table in document.tables]
    return replace(document, words=title, first_tables=first, tables=tables)
