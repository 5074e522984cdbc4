"""Pages by which people judge a built dataset: `stats.html` (counts and plots) and `gallery.html` (pictures).

Both are single files that load nothing and run no script. `statistics_page.write_statistics(folder)` reads stats files
and tables, `gallery.write_gallery(folder)` some samples; both read finished units only and may be run at any time.
"""
