# SPDX-License-Identifier: Apache-2.0
"""The Debian package on the releases that users have: installed, used, removed."""

import re

import pytest

from tests.real.processes import run
from tests.real.programs import PROJECT
from vhost_airlock import __version__

pytestmark = pytest.mark.real

SCRIPT = r"""
listed() {
    find / -xdev \( -path /tmp -o -path /var/log -o -path /var/lib/apt \
        -o -path '/var/cache/*' -o -path '/var/lib/dpkg/*-old' \) -prune -o -print |
        sort
    cat /var/lib/dpkg/status
}
export DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8
unset PYTHONPATH PYTHONDONTWRITEBYTECODE
listed > before
apt-get -qq install --yes ./*.deb > apt.log 2>&1
echo "version: $(cd /; vhost-airlock --version)"
echo "demo: $(cd /; vhost-airlock demo | tail -n 1)"
echo "man: $(man --warnings vhost-airlock 2>&1 | grep -x -A 1 NAME | tail -n 1)"
echo "man: $(man vhost-airlock-qemu-system-x86_64 | grep -c 'vhost-airlock qemu')"
echo "zsh: $(zsh -c 'autoload -U compinit; compinit -D; echo $_comps[vhost-airlock]')"
bash -c '
    . /usr/share/bash-completion/bash_completion
    _completion_loader vhost-airlock
    COMP_WORDS=(vhost-airlock run --keep) COMP_CWORD=2
    completes=$(complete -p vhost-airlock | sed "s/.* -F \([^ ]*\) .*/\1/")
    $completes vhost-airlock --keep run
    echo "bash: ${COMPREPLY[*]}"'
apt-get -qq purge --yes vhost-airlock >> apt.log 2>&1
listed > after
diff before after && echo nothing is left
"""


def test_package_is_used_and_leaves_nothing(package):
    told = run(
        package.release("sh", "-uc", f"cd {package.folder}\n{SCRIPT}"),
        package.folder / "log",
        timeout=120,
    )
    lines = re.sub(r"in \d+\.\d s", "in N s", told).splitlines()
    assert lines == [
        f"version: vhost-airlock {__version__}",
        "demo: PASSED in N s",
        "man:        vhost-airlock - keeps guest memory away from vhost-user back-ends",
        "man: 2",
        "zsh: _vhost-airlock",
        "bash: --keep-backend",
        "nothing is left",
    ]


def test_package_has_the_version_of_the_program():
    changelog = (PROJECT / "debian" / "changelog").read_text()
    assert changelog.startswith(f"vhost-airlock ({__version__}) ")


def test_lintian_finds_nothing(package):
    if not package.release.path("/usr/bin/lintian").exists():
        pytest.skip("one release has lintian, and that is enough")
    lint = package.release(
        "sh", "-c", f"LC_ALL=C.UTF-8 lintian {package.folder}/{package.name} 2>&1"
    )
    lines = run(lint, package.folder / "log").splitlines()
    assert lines == ["running with root privileges is not recommended!"]
