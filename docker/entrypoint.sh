#!/bin/sh
# Starts Python with the arguments, after laying the image's kernels into the cache folder, which is often mounted.
set -eu

built=/opt/cache # with the folder ops; stays readable whatever is mounted
cache=${DNNLIB_CACHE_DIR:-/cache}

if mkdir -p "$cache/ops" 2>/dev/null && [ -w "$cache/ops" ]; then
    # Other containers may do the same right now: what is not whole, launches do not take.
    cp -u "$built"/ops/*.cubin "$cache/ops/" || echo "Note: $cache/ops lacks kernels of the image." >&2
else
    echo "Note: $cache cannot be written, so downloads are not kept; kernels come from the image." >&2
    export DNNLIB_CACHE_DIR="$built"
fi
exec python "$@"
