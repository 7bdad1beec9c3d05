"""The page about Django shows a project, and the tests of that project pass."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.support.pages import Page

PAGE = Page("docs/how-to/django.md").text


def manage(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *args, "--settings=mysite.settings", "--pythonpath=."],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_project_on_the_page_passes_its_tests(tmp_path: Path) -> None:
    (tmp_path / "mysite").mkdir()
    files = re.findall(r"^```python\n# (\S+)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    assert len(files) == PAGE.count("```python")
    for name, text in [("mysite/__init__.py", ""), *files]:
        (tmp_path / name).write_text(text, encoding="utf-8")
    tested = manage(tmp_path, "-m", "django", "test", "mysite")
    assert tested.returncode == 0, tested.stderr
    assert "Ran 1 test" in tested.stderr
    checked = manage(tmp_path, "-m", "django", "check", "--fail-level=WARNING")
    assert checked.returncode == 0, checked.stderr
    served = subprocess.run(
        [sys.executable, "-c", "from mysite.wsgi import application; print(application)"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "PoolRunner" in served.stdout, served.stderr
