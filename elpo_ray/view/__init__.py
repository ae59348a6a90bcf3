"""The tree viewer: a run folder as one page that needs no network and no installation.

`folder` reads what is there, in whatever state, and says what it could not read; `records` makes
compact data of a tree and its credit, which is computed by `elpo_ray.credit`, the code that trains;
`book` keeps both per step file, so that a run still being written is read once; `page` puts it into
one HTML file, `server` serves it on loopback. The page's own parts are in `assets/`.
"""
