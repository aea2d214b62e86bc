"""How the pages become a site (`make docs`): Sphinx reads the Markdown as it lies here, furo is the look.

Sphinx and furo rather than MkDocs with Material: in 2026 MkDocs 1 has no maintainer, Material is in maintenance mode.
The price is a second set of packages, which live in a virtual environment of their own (docs/requirements.txt).
"""

project = "nanochat for Transformers"
html_title = project
extensions = ["myst_parser", "sphinx_copybutton"]
exclude_patterns = ["_build", "figures", "requirements.txt"]
root_doc = "index"
html_theme = "furo"
html_theme_options = {
    "source_repository": "",
    "light_css_variables": {"font-stack": "Georgia, 'Times New Roman', serif", "color-brand-primary": "#1f5fa8"},
    "dark_css_variables": {"color-brand-primary": "#9fb8d6"},
}
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_copy_source = False
html_show_sphinx = html_show_copyright = False
myst_heading_anchors = 3  # links to headings, as on GitHub
suppress_warnings = ["misc.highlighting_failure", "toc.empty_glob"]  # output is no code; some pages may not be there
highlight_language = "text"  # indented blocks are commands and what they print
copybutton_prompt_text = "$ "
