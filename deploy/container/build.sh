#!/usr/bin/env bash
# Builds the container image with buildah; needs neither an engine nor, with chroot isolation, a container runtime.
#
# Environment: TAG (default jouletrace:VERSION), BASE_IMAGE and BUILD_IMAGE (default: those of the Containerfile),
# BUILDAH (default buildah; with its storage options), BUILDAH_OPTIONS (more options of `buildah build`, such as
# `--volume /etc/pip.conf:/etc/pip.conf:ro` where packages come from a mirror), SOURCE_DATE_EPOCH (default: time of the
# last commit).
set -euo pipefail
cd "$(dirname "$0")/../.."
version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' exporter/jouletrace/__init__.py)
revision=$(git rev-parse HEAD 2>/dev/null || echo unknown)
epoch=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || stat -c %Y pyproject.toml)}
options=(--isolation chroot --format oci --file deploy/container/Containerfile --timestamp "$epoch"
  --build-arg "VERSION=$version" --build-arg "REVISION=$revision" --build-arg "CREATED=$(date -u -d "@$epoch" +%FT%TZ)")
if [ -n "${BASE_IMAGE:-}" ]; then options+=(--build-arg "BASE_IMAGE=$BASE_IMAGE"); fi
if [ -n "${BUILD_IMAGE:-}" ]; then options+=(--build-arg "BUILD_IMAGE=$BUILD_IMAGE"); fi
# shellcheck disable=SC2086  (options and words of a command)
${BUILDAH:-buildah} bud "${options[@]}" ${BUILDAH_OPTIONS:-} \
  --ignorefile deploy/container/Containerfile.containerignore --tag "${TAG:-jouletrace:$version}" .
