"""mod_wsgi: Debian's apache2 with a configuration for the tests and a copy of the code.

The module is built for Debian's Python and imports as the user www-data, who may not be able to
read a clone of the repository.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
from pathlib import Path

MODULES = Path("/usr/lib/apache2/modules")

# Modules that the application imports, with their own imports.
CODE = (
    *("wsgi_bg", "werkzeug", "markupsafe"),
    *("anyio", "idna", "sniffio", "typing_extensions"),
)

CONFIGURATION = """
LoadModule mpm_event_module {modules}/mod_mpm_event.so
LoadModule authz_core_module {modules}/mod_authz_core.so
LoadModule wsgi_module {modules}/mod_wsgi.so
Listen 127.0.0.1:{port}
ServerName 127.0.0.1
ServerRoot {folder}
PidFile {folder}/apache.pid
Mutex file:{folder}
ErrorLog /dev/stderr
User www-data
Group www-data
ServerLimit 1
StartServers 1
ThreadsPerChild 25
MaxRequestWorkers 25
KeepAlive On
WSGISocketPrefix {folder}/wsgi
WSGIScriptAlias / {folder}/app.wsgi
WSGIApplicationGroup %{{GLOBAL}}
<Directory {folder}>
    Require all granted
</Directory>
"""

DAEMON = """
WSGIRestrictEmbedded On
WSGIDaemonProcess suite processes=1 threads=4 python-path={folder}
WSGIProcessGroup suite
"""

EMBEDDED = """
WSGIPythonPath {folder}
"""


def missing() -> str | None:
    """Reason why mod_wsgi cannot run here; None if mod_wsgi can run."""
    if shutil.which("apache2", path="/usr/sbin:/usr/bin") is None:
        return "there is no apache2 (Debian's package of this name)"
    module = MODULES / "mod_wsgi.so"
    if not module.exists():
        return "there is no mod_wsgi.so (Debian's libapache2-mod-wsgi-py3)"
    built_for = re.search(r"[0-9.]+$", module.resolve().name)
    here = "{}.{}".format(*sys.version_info)
    if built_for is None or built_for[0] != here:
        return f"Debian's mod_wsgi is not built for Python {here}"
    return None


def command(folder: Path, port: int, module: str, mode: str) -> list[str]:
    """The command that serves ``module`` from a copy of the code in ``folder``."""
    for name in CODE:
        _copy(name, folder)
    root = Path(__file__).parent
    shutil.copytree(root, folder / "tests/servers", ignore=shutil.ignore_patterns("test_*"))
    (folder / "tests/__init__.py").touch()
    (folder / "app.wsgi").write_text(f"from {module} import application\n")
    configuration = folder / "apache.conf"
    configuration.write_text(
        (CONFIGURATION + mode).format(folder=folder, port=port, modules=MODULES)
    )
    return ["/usr/sbin/apache2", "-f", str(configuration), "-DFOREGROUND"]


def _copy(name: str, folder: Path) -> None:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:  # only other versions of Python need these
        return
    origin = Path(spec.origin)
    if origin.name == "__init__.py":
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(origin.parent, folder / name, ignore=ignored)
    else:
        shutil.copy(origin, folder)
