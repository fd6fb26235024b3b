package main

import (
	"bytes"
	"fmt"
	"math"
	"time"

	"github.com/imdsgate/imdsgate/cmd/imdsgate-load/load"
)

// drawing is the latencies by percentile. Each further nine of the percentiles takes as much room as the one before.
func drawing(r *load.Result) []byte {
	const width, height, left, top, right, bottom = 900, 420, 80, 40, 20, 50
	curve := r.Curve()
	least, most := math.Inf(1), 1e-6
	nines := 1.0
	for _, p := range curve {
		if p.Seconds > 0 {
			least = min(least, p.Seconds)
		}
		most = max(most, p.Seconds)
		nines = max(nines, place(p.Percentile))
	}
	low, high := math.Floor(math.Log10(min(least, most))), math.Ceil(math.Log10(most))
	if high == low {
		high++
	}
	x := func(percentile float64) float64 { return left + place(percentile)/nines*(width-left-right) }
	y := func(seconds float64) float64 {
		return top + (high-math.Log10(max(seconds, math.Pow(10, low))))/(high-low)*(height-top-bottom)
	}
	var b bytes.Buffer
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" font-family="sans-serif" font-size="13">`+"\n", width, height)
	fmt.Fprintf(&b, `<rect width="%d" height="%d" fill="#fff"/><text x="%d" y="22" font-size="15">%s, IMDSv%d, %v/s: latency by percentile, %d operations, %d failed</text>`+"\n",
		width, height, left, r.Options.Sequence, r.Options.Version, r.Options.Rate, r.Operations, r.Failed)
	for _, p := range []float64{0, 50, 75, 90, 95, 99, 99.5, 99.9, 99.99, 99.999} {
		if place(p) > nines {
			break
		}
		fmt.Fprintf(&b, `<path d="M%.1f %d V%d" stroke="#ddd"/><text x="%.1f" y="%d" text-anchor="middle">%v %%</text>`+"\n", x(p), top, height-bottom, x(p), height-bottom+20, p)
	}
	for e := low; e <= high; e++ {
		s := math.Pow(10, e)
		fmt.Fprintf(&b, `<path d="M%d %.1f H%d" stroke="#ddd"/><text x="%d" y="%.1f" text-anchor="end">%v</text>`+"\n",
			left, y(s), width-right, left-8, y(s)+4, time.Duration(math.Round(s*1e9)))
	}
	b.WriteString(`<polyline fill="none" stroke="#c33" stroke-width="2" points="`)
	for _, p := range curve {
		fmt.Fprintf(&b, "%.1f,%.1f ", x(p.Percentile), y(p.Seconds))
	}
	b.WriteString("\"/>\n</svg>\n")
	return b.Bytes()
}

func place(percentile float64) float64 { return -math.Log10(1 - min(percentile, 99.9999)/100) }
