"""How Sphinx makes a site of the pages where they stand in the repository, so that their links are right in both."""

project = "tunerkit"
copyright = "the tunerkit authors"  # noqa: A001 - Sphinx's name
extensions = ["myst_parser"]

root_doc = "docs/index"
include_patterns = [
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "benchmarks/**.md",
    "docs/**.md",
    "examples/*/README.md",
    "plugins/*/README.md",
]
exclude_patterns = [".*", "tests", "tunerkit"]  # not even looked through

html_theme = "furo"
html_title = "tunerkit"
html_static_path = ["static"]
html_css_files = ["tables.css"]
html_extra_path = ["root"]  # what leads from the top of the site to its first page

nitpicky = True
myst_heading_anchors = 4  # headings can be linked to as in the repository
