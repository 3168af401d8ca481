#!/usr/bin/env bash
# Builds dist/jouletrace_VERSION_ARCH.deb with debhelper, for the Debian release whose python3 is $PYTHON's version.
#
# The package brings its Python packages, as wheels that are pinned with their hashes (requirements.txt, made anew by
# `make lock`): Debian 12 has aiohttp 3.8 and structlog 22 and no msgspec at all. They lie in /usr/lib/jouletrace, out of
# the way of every other Python program, and are compiled already, as the service may not write there.
#
# Environment: PYTHON (default python3), SOURCE_DATE_EPOCH (default: time of the last commit).
set -euo pipefail
cd "$(dirname "$0")/../.."
./tests/system-packages.sh debhelper dpkg-dev
python=${PYTHON:-python3}
if [ -z "${SOURCE_DATE_EPOCH:-}" ]; then
  SOURCE_DATE_EPOCH=$(git log -1 --format=%ct 2>/dev/null) || SOURCE_DATE_EPOCH=$(stat -c %Y pyproject.toml)
fi
export SOURCE_DATE_EPOCH
minor=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
next=$("$python" -c 'import sys; print("%d.%d" % (sys.version_info[0], sys.version_info[1] + 1))')

work=build/deb/jouletrace
rm -rf build/deb
mkdir -p "$work/root" build/deb/wheel dist
cp -r deploy/deb/debian "$work/"
tree=$work/root/usr/lib/jouletrace

"$python" -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir build/deb/wheel .
install=("$python" -m pip install --quiet --disable-pip-version-check --no-compile --no-warn-script-location
  --only-binary :all: --no-deps --target "$tree")
"${install[@]}" --require-hashes --requirement deploy/deb/requirements.txt
rm -rf "$tree/bin" # of the packages' programs, which would be called past the launcher
"${install[@]}" build/deb/wheel/jouletrace-*.whl
version=$(basename build/deb/wheel/jouletrace-*.whl | cut -d- -f2)
rm -rf "$tree/bin"
# Half of the files are for who develops with the packages; the tests of NumPy alone are a sixth of the bytes.
find "$tree" -type f \( -name '*.pyi' -o -name '*.pyx' -o -name '*.pxd' -o -name '*.[cha]' \) -delete
find "$tree" -type d -name tests -prune -exec rm -rf {} +
# pip notes where its input was, which differs from build to build.
find "$tree" -name direct_url.json -delete
find "$tree" -type f -perm /111 -exec chmod 644 {} +
"$python" -m compileall -q --invalidation-mode unchecked-hash -s "$tree" -p /usr/lib/jouletrace "$tree"

install -D -m 755 /dev/stdin "$work/root/usr/bin/jouletrace" <<LAUNCHER
#!/usr/bin/python$minor -IS
import sys

sys.path.insert(0, "/usr/lib/jouletrace")
from jouletrace.cli import main

sys.exit(main())
LAUNCHER
install -D -m 644 deploy/deb/jouletrace.yml "$work/root/etc/jouletrace/jouletrace.yml"
for unit in jouletrace.service jouletrace.socket; do cp "systemd/$unit" "$work/debian/"; done
cp systemd/jouletrace-ingest.socket "$work/debian/jouletrace.jouletrace-ingest.socket"
cp systemd/jouletrace.sysusers systemd/jouletrace.tmpfiles "$work/debian/"
echo 'root/* /' > "$work/debian/jouletrace.install"
install -m 644 docs/man/* "$work/debian/"
printf 'debian/%s\n' jouletrace.1 jouletrace.yml.5 > "$work/debian/jouletrace.manpages"
sed -i "s/@PYTHON@/$minor/; s/@NEXT_PYTHON@/$next/" "$work/debian/control"
cat > "$work/debian/changelog" <<CHANGELOG
jouletrace ($version-1~py${minor/./}) unstable; urgency=medium

  * See the release notes of jouletrace $version.

 -- The jouletrace authors <maintainers@jouletrace.example>  $(date -uR -d "@$SOURCE_DATE_EPOCH")
CHANGELOG

( cd "$work" && dpkg-buildpackage --build=binary --no-sign -d > ../build.log 2>&1 ) || { tail -30 build/deb/build.log; exit 1; }
mv build/deb/*.deb dist/
ls -sh dist/jouletrace_*.deb
