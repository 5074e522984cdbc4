"""The human judge: a page of blinded pairs (`kit`) for raters, and what their answers say (`answers`, `win_rates`).

folder = write_kit(results, Path("human"))         # give index.html to raters, keep key.json
print(as_markdown(read_answers(Path("human"), [Path("answers-anna.json"), Path("answers-bo.json")])))
"""

from infer.evaluate.human.answers import read_answers
from infer.evaluate.human.kit import write_kit
from infer.evaluate.human.win_rates import WinRates, as_markdown

__all__ = ["WinRates", "as_markdown", "read_answers", "write_kit"]
