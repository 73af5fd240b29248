"""Write the table of rewards with verified weights into docs/reference/verified-weights.md.

python -m benchmarks.verified
"""

from pathlib import Path

from iqareward.cli.verify import page_table

PAGE = Path(__file__).parents[1] / "docs/reference/verified-weights.md"
BEGIN, END = "<!-- table: python -m benchmarks.verified -->", "<!-- end of table -->"

if __name__ == "__main__":
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{page_table()}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")
