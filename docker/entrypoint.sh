#!/bin/sh
# Starts Python with the arguments, after copying the image's kernels to the cache folder, which is often a mount.
set -eu

built=/opt/cache # holds the folder ops; readable whatever is mounted
cache=${DNNLIB_CACHE_DIR:-/cache}

if mkdir -p "$cache/ops" 2>/dev/null && [ -w "$cache/ops" ]; then
    # Other containers may copy at the same time; incomplete files are ignored when kernels are loaded.
    cp -u "$built"/ops/*.cubin "$cache/ops/" || echo "Note: $cache/ops lacks kernels of the image." >&2
else
    echo "Note: $cache is not writable, so downloads are not kept; kernels come from the image." >&2
    export DNNLIB_CACHE_DIR="$built"
fi
exec python "$@"
