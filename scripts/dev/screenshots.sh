#!/usr/bin/env bash
# Pictures of a page of docs/images in headless Chromium: scripts/dev/screenshots.sh PAGE.html NAME
# NAME-light.png and NAME-dark.png are 1280 pixels wide, NAME-narrow-*.png 400. Fails if the page
# writes to the browser's console. CHROMIUM names the browser, HEIGHT the pixels of height.
set -euo pipefail
page=$(realpath -e "$1")
images=$(cd "$(dirname "$0")/../../docs/images" && pwd)
profile=$(mktemp -d)
trap 'rm -rf "$profile"' EXIT

picture() { # FILE WIDTH SCHEME, which is 0 for dark and 1 for light
    "${CHROMIUM:-chromium}" --headless=new --no-sandbox --disable-gpu --hide-scrollbars --no-first-run \
        --user-data-dir="$profile" --virtual-time-budget=3000 --enable-logging=stderr \
        --window-size="$2,${HEIGHT:-1400}" --blink-settings="preferredColorScheme=$3" \
        --screenshot="$1" "file://$page" 2>"$profile/said" || { cat "$profile/said" >&2; exit 1; }
    if grep CONSOLE "$profile/said" >&2; then exit 1; fi
}
for scheme in dark=0 light=1; do
    picture "$images/$2-${scheme%=*}.png" 1280 "${scheme#*=}"
    picture "$images/$2-narrow-${scheme%=*}.png" 400 "${scheme#*=}"
done
ls -l "$page" "$images/$2"-*.png
