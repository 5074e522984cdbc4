"""The report of a run: pages to look at, tables to quote, numbers to go on with.

report.html      everything in one file: tables, plots, pictures, settings; no script, no network
report.md        the tables, for a README
images.html      every picture with its numbers, to sort and filter; reads the pictures beside it
scores.parquet   the same numbers for programs
"""

from infer.evaluate.report.page import write_report

__all__ = ["write_report"]
