package first

import (
	"bufio"
	"fmt"
	"io"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Histogram is a Prometheus histogram with classic buckets.
type Histogram struct {
	Count   float64  `json:"count"`
	Buckets []Bucket `json:"buckets,omitempty"` // by bound; without those above the last observation
}

// Bucket counts the observations up to a bound.
type Bucket struct {
	Bound float64 `json:"le"` // seconds
	Count float64 `json:"count"`
}

// Within is the smallest bound that so large a part of the observations did not exceed; 0 if there are none, infinite if they
// exceed all bounds.
func (h Histogram) Within(part float64) float64 {
	if h.Count == 0 {
		return 0
	}
	for _, b := range h.Buckets {
		if b.Count >= part*h.Count {
			return b.Bound
		}
	}
	return math.Inf(1)
}

// Over counts the observations that exceed a bound; for a bound that is no bucket's, those that exceed the next smaller one.
func (h Histogram) Over(bound time.Duration) float64 {
	within := 0.0
	for _, b := range h.Buckets {
		if b.Bound <= bound.Seconds() {
			within = b.Count
		}
	}
	return h.Count - within
}

// Metrics are the samples of an exposition in text format by what stands before the value, such as
// imdsgate_http_requests_total{handler="token",code="200"}.
type Metrics map[string]float64

// Read adds an exposition's samples to those that are there.
func (m Metrics) Read(r io.Reader) error {
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		line := lines.Text()
		at := strings.LastIndexByte(line, ' ')
		if at < 0 || line[0] == '#' {
			continue
		}
		v, err := strconv.ParseFloat(line[at+1:], 64)
		if err != nil {
			return fmt.Errorf("metrics: %q: %w", line, err)
		}
		m[line[:at]] += v
	}
	return lines.Err()
}

// Since is what has been added since earlier.
func (m Metrics) Since(earlier Metrics) Metrics {
	d := Metrics{}
	for k, v := range m {
		d[k] = v - earlier[k]
	}
	return d
}

// Sum adds the samples of a name whose labels hold all of these, each as label="value".
func (m Metrics) Sum(name string, labels ...string) (sum float64) {
	for k, v := range m {
		if matches(k, name, labels) {
			sum += v
		}
	}
	return sum
}

// Histogram is that of a name, of all series together whose labels hold one of these; of all series, if there are none.
func (m Metrics) Histogram(name string, labels ...string) (h Histogram) {
	byBound := map[float64]float64{}
	for k, v := range m {
		if len(labels) > 0 && !slices.ContainsFunc(labels, func(l string) bool { return strings.Contains(k, l) }) {
			continue
		}
		if matches(k, name+"_count", nil) {
			h.Count += v
		}
		if !matches(k, name+"_bucket", nil) {
			continue
		}
		_, le, _ := strings.Cut(k, `le="`)
		le, _, _ = strings.Cut(le, `"`)
		if bound, err := strconv.ParseFloat(le, 64); err == nil && !math.IsInf(bound, 1) {
			byBound[bound] += v
		}
	}
	for bound, n := range byBound {
		h.Buckets = append(h.Buckets, Bucket{bound, n})
	}
	slices.SortFunc(h.Buckets, func(a, b Bucket) int {
		if a.Bound < b.Bound {
			return -1
		}
		return 1
	})
	if i := slices.IndexFunc(h.Buckets, func(b Bucket) bool { return b.Count == h.Count }); i >= 0 {
		h.Buckets = h.Buckets[:i+1]
	}
	return h
}

func matches(series, name string, labels []string) bool {
	rest, ok := strings.CutPrefix(series, name)
	if !ok || rest != "" && rest[0] != '{' {
		return false
	}
	for _, l := range labels {
		if !strings.Contains(rest, l) {
			return false
		}
	}
	return true
}
