"""Sphinx settings of the site; docs/build.py writes the pages that it reads."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from build import SRC, settings

project = settings["lib_name"]
author, copyright, release = settings["author"], settings["copyright"], settings["version"]
extensions = ["myst_nb"]
exclude_patterns = ["files/**"]                        # notebooks as they are in the repository, to download
suppress_warnings = ["ref.python"]                     # an annotation may name a class that two modules have
nb_execution_mode = "off"                              # outputs are those that were committed
nb_merge_streams = True
nb_ipywidgets_js = {}                                   # widgets would load scripts from elsewhere
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "fieldlist", "html_image"]
myst_heading_anchors = 4
myst_heading_slug_func = "build.jupyter_anchor"        # links are written as JupyterLab wants them
python_maximum_signature_line_length = 80
toc_object_entries_show_parents = "hide"
mathjax_path = "tex-svg-full.js"                       # one file without fonts, copied from a package by docs/build.py
html_theme = "furo"
html_title = project
html_static_path = [str(SRC / "_static")]
html_css_files = ["site.css"]
html_js_files = [("site.js", {"defer": "defer"})]
html_favicon = str(Path(__file__).parent / "icon.svg")
html_copy_source = html_show_sourcelink = False
html_use_opensearch = ""
html_theme_options = {"navigation_with_keys": True, "top_of_page_buttons": []}
