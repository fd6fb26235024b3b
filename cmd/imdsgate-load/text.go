package main

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/imdsgate/imdsgate/cmd/imdsgate-load/load"
)

func (c *config) describe() string {
	what := map[load.Sequence]string{
		load.Document: "credential document", load.Full: "whole sequence (session token, role list, document)",
	}[c.Sequence]
	if c.Sequence == load.Full && c.Version == 1 {
		what = "whole sequence (role list, document)"
	}
	reuse := map[load.Reuse]string{
		load.Keep: "connections are kept", load.PerSequence: "a new connection for each", load.PerRequest: "a new connection for each request",
	}[c.Reuse]
	return fmt.Sprintf("asking %s for the %s, IMDSv%d, %v a second for %v, %s, at most %d at a time",
		c.Endpoint, what, c.Version, c.Rate, c.Duration, reuse, c.Connections)
}

// text is a Result for people.
func text(r *load.Result) string {
	var b strings.Builder
	took := r.Elapsed - r.Options.Warmup
	fmt.Fprintf(&b, "\n%d operations in %v (%.1f a second), %d failed\n", r.Operations, took.Round(time.Millisecond),
		float64(r.Operations)/took.Seconds(), r.Failed)
	for _, what := range slices.Sorted(maps.Keys(r.Errors)) {
		fmt.Fprintf(&b, "  %6d × %s\n", r.Errors[what], what)
	}
	if r.Latency.TotalCount() == 0 {
		return b.String()
	}
	fmt.Fprintf(&b, "\nof all operations   answered within\n")
	longest := time.Duration(r.Latency.Max())
	for _, p := range []float64{50, 90, 99, 99.9, 100} {
		if float64(r.Latency.TotalCount())*(100-p) < 100 && p < 100 && p > 50 {
			continue // there are not enough of them to tell
		}
		d := time.Duration(r.Latency.ValueAtPercentile(p))
		fmt.Fprintf(&b, "%12v %%      %10v  %s\n", p, round(d), strings.Repeat("█", int(40*d/max(longest, 1))))
	}
	q := load.Summarize(r.Lateness)
	if late := time.Duration(q.P99 * float64(time.Second)); late > time.Duration(r.Latency.ValueAtPercentile(99))/4 {
		fmt.Fprintf(&b, "\nThis program itself was late: by up to %v in 99 %% of the cases, which is in the figures. It has too little CPU.\n", round(late))
	}
	return b.String()
}

// round keeps three digits.
func round(d time.Duration) time.Duration {
	unit := time.Duration(1)
	for ; d/unit >= 1000; unit *= 10 {
	}
	return d.Round(unit)
}
