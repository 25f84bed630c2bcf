#!/usr/bin/env bash
# Builds the image without a container engine and runs it as the compose file does: `make image-test`. Needs root, buildah
# and debootstrap, a Debian mirror and a package index; a quarter of an hour the first time, minutes after that.
#
#   IMAGE_BASE=name       an image to build on instead of a bare Debian with Python
#   IMAGE_MOUNTS="a:b c"  what a build machine has of its own for pip: its configuration, certificates, local wheels
#   IMAGE_WORK=folder     where the Debian is kept
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

for tool in buildah debootstrap curl setpriv; do
    command -v "$tool" >/dev/null || { echo "image-test: $tool is not installed"; exit 1; }
done
[ "$(id -u)" = 0 ] || { echo 'image-test: needs root, for chroot and mounts'; exit 1; }

export STORAGE_DRIVER=vfs BUILDAH_ISOLATION=chroot
work=${IMAGE_WORK:-/var/tmp/latentd-image}
base=${IMAGE_BASE:-localhost/latentd-base}
port=${IMAGE_PORT:-8099}
version=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' app/__init__.py)
mkdir -p "$work"

if [ -z "${IMAGE_BASE:-}" ] && ! buildah inspect --type image "$base" >/dev/null 2>&1; then
    # shellcheck disable=SC1091
    . /etc/os-release
    debootstrap --variant=minbase --include=ca-certificates,python3,python3-venv "$VERSION_CODENAME" "$work/debian" >"$work/debootstrap.log"
    rm -rf "$work"/debian/var/cache/apt/*.bin "$work"/debian/var/cache/apt/archives/*.deb "$work"/debian/var/lib/apt/lists/*
    container=$(buildah from scratch)
    buildah copy -q "$container" "$work/debian" / >/dev/null
    buildah commit -q "$container" "$base" >/dev/null
    buildah rm "$container" >/dev/null
fi

mounts=()
for each in ${IMAGE_MOUNTS:-}; do
    case $each in *:*) mounts+=(-v "$each:ro") ;; *) mounts+=(-v "$each:$each:ro") ;; esac
done
# In Docker's own format: the other one has no health check.
buildah bud --format docker --layers --force-rm --network host --build-arg BASE="$base" --build-arg TORCH_INDEX="${TORCH_INDEX-}" --build-arg VERSION="$version" \
    --build-arg REVISION="$(git rev-parse HEAD 2>/dev/null || true)" "${mounts[@]}" -t localhost/latentd . >"$work/build.log" 2>&1 ||
    { tail -20 "$work/build.log"; exit 1; }
buildah images --format '{{.Name}} {{.Size}}' localhost/latentd
buildah inspect --type image --format '{{.OCIv1.Config.Labels}}' localhost/latentd | grep -q "image.version:$version" ||
    { echo 'image-test: the labels lack the version'; exit 1; }
buildah inspect --type image --format '{{.Docker.Config.Healthcheck.Test}}' localhost/latentd | grep -q healthcheck.py ||
    { echo 'image-test: there is no health check'; exit 1; }

# What the compose file wants: a root that nobody writes to, a /scratch in memory, no capabilities, no new privileges.
container=$(buildah from localhost/latentd)
root=$(buildah mount "$container")
server=
tidy() {
    [ -z "$server" ] || kill -KILL "$server" 2>/dev/null || true
    umount -R "$work/root" 2>/dev/null || true
    buildah rm "$container" >/dev/null
}
trap tidy EXIT
mkdir -p "$work/root"
mount -o bind "$root" "$work/root"
mount -o remount,bind,ro "$work/root"
mount -t tmpfs -o size=2g,uid=10001,gid=10001,mode=0700 latentd-scratch "$work/root/scratch"
mount -t proc proc "$work/root/proc"
mount -o bind /dev "$work/root/dev"
inside=(chroot "$work/root" setpriv --reuid 10001 --regid 10001 --clear-groups --bounding-set=-all --inh-caps=-all --no-new-privs
    env -i HOME=/scratch TMPDIR=/scratch XDG_CACHE_HOME=/scratch/cache PATH=/opt/venv/bin:/usr/bin:/bin LATENTD_MODELS=/models)

"${inside[@]}" sh -c 'touch /opt/latentd/written 2>/dev/null' && { echo 'image-test: the root is written to'; exit 1; }
"${inside[@]}" python -c 'import json; found = json.load(open("/opt/latentd/sbom.cdx.json")); names = {each["name"] for each in found["components"]}; assert {"torch", "numpy", "latentd"} <= names, names; print("SBOM:", len(names), "components")'
"${inside[@]}" latentd --version
"${inside[@]}" latentd serve --host 127.0.0.1 --port "$port" >"$work/server.log" 2>&1 &
server=$!
url=http://127.0.0.1:$port
for _ in $(seq 120); do
    curl -fsS -o /dev/null "$url/healthz/ready" 2>/dev/null && break
    kill -0 "$server" 2>/dev/null || { cat "$work/server.log"; exit 1; }
    sleep 0.5
done
"${inside[@]}" python -c 'import sys; sys.path.insert(0, "/opt/latentd"); from healthcheck import lives; assert lives(sys.argv)' --port "$port"
curl -fsS --data-binary @tests/pictures/astronaut.png -o "$work/latent.npy" "$url/encode"
curl -fsS --data-binary @"$work/latent.npy" -o "$work/picture.png" "$url/decode"
curl -fsS --data-binary @tests/pictures/astronaut.png -H 'Accept: application/json' "$url/compare" | grep -q '"psnr_db"'
[ "$(head -c 8 "$work/picture.png" | od -An -tx1 | tr -d ' ')" = 89504e470d0a1a0a ] || { echo 'image-test: no PNG came back'; exit 1; }
kill -TERM "$server"
wait "$server" || { echo "image-test: the service ended with status $?"; cat "$work/server.log"; exit 1; }
server=
echo 'image-test: built, and served a round trip from a read-only root as uid 10001; stopped with status 0'
