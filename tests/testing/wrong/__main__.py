"""Write the page of wrong plugins."""

from testing.wrong import WRONG
from testing.wrong.page import PAGE, written

PAGE.write_text(written(WRONG), encoding="utf-8")
