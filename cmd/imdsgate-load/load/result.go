package load

import (
	"encoding/json"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
)

// Result is what was measured. Its JSON form is stable: durations in seconds.
type Result struct {
	Options    Options // complete
	Began      time.Time
	Elapsed    time.Duration    // until the last answer
	Operations int64            // that began after the warm-up
	Failed     int64            // of them
	Errors     map[string]int64 // failed operations by what went wrong: timeout, refused, cut, status 503, ...

	// Latency is in nanoseconds, from the moment an operation was to begin to its last answer. It holds the good operations, and
	// those that failed because time ran out, with the time that they had waited.
	Latency *hdrhistogram.Histogram
	// Lateness is how late the generator itself began operations that had a connection, in nanoseconds. It is a part of Latency.
	Lateness *hdrhistogram.Histogram
}

// Quantiles are durations in seconds.
type Quantiles struct {
	Min  float64 `json:"min"`
	Mean float64 `json:"mean"`
	P50  float64 `json:"p50"`
	P90  float64 `json:"p90"`
	P99  float64 `json:"p99"`
	P999 float64 `json:"p99_9"`
	Max  float64 `json:"max"`
}

// Point is a point of a curve of latencies.
type Point struct {
	Percentile float64 `json:"percentile"`
	Seconds    float64 `json:"seconds"`
}

// percentiles are those of Curve.
func percentiles() []float64 {
	return []float64{0, 10, 20, 30, 40, 50, 60, 70, 75, 80, 85, 90, 92.5, 95, 97, 98, 99, 99.25, 99.5, 99.75, 99.9, 99.95, 99.99, 99.995, 99.999}
}

const (
	shortest, longest = int64(100 * time.Nanosecond), int64(10 * time.Minute) // that a histogram tells apart
	digits            = 3
)

func newHistogram() *hdrhistogram.Histogram { return hdrhistogram.New(shortest, longest, digits) }

func record(h *hdrhistogram.Histogram, d time.Duration) {
	_ = h.RecordValue(min(max(int64(d), 0), longest)) // fails outside these bounds only
}

// Summarize reads the usual quantiles off a histogram of nanoseconds.
func Summarize(h *hdrhistogram.Histogram) Quantiles {
	at := func(p float64) float64 { return seconds(h.ValueAtPercentile(p)) }
	return Quantiles{Min: seconds(h.Min()), Mean: h.Mean() / 1e9, P50: at(50), P90: at(90), P99: at(99), P999: at(99.9), Max: seconds(h.Max())}
}

// Curve is the latencies by percentile, no further than there are operations to tell.
func (r *Result) Curve() []Point {
	var points []Point
	n := float64(r.Latency.TotalCount())
	for _, p := range percentiles() {
		if n*(100-p) < 100 { // fewer than one operation is beyond
			break
		}
		points = append(points, Point{p, seconds(r.Latency.ValueAtPercentile(p))})
	}
	return points
}

func seconds(nanoseconds int64) float64 { return time.Duration(nanoseconds).Seconds() }

// JSON is the JSON form of a Result.
type JSON struct {
	Endpoint    string           `json:"endpoint"`
	Sequence    Sequence         `json:"sequence"`
	Version     int              `json:"version"`
	Reuse       Reuse            `json:"reuse"`
	Connections int              `json:"connections"`
	Rate        float64          `json:"rate"` // offered, operations a second
	Began       time.Time        `json:"began"`
	Elapsed     float64          `json:"elapsed"`
	Operations  int64            `json:"operations"`
	Failed      int64            `json:"failed"`
	Errors      map[string]int64 `json:"errors"`
	Latency     Quantiles        `json:"latency"`
	Lateness    Quantiles        `json:"lateness"`
	Curve       []Point          `json:"curve"`
}

// MarshalJSON writes the form of JSON.
func (r *Result) MarshalJSON() ([]byte, error) {
	o := r.Options
	return json.Marshal(JSON{
		Endpoint: o.Endpoint.String(), Sequence: o.Sequence, Version: o.Version, Reuse: o.Reuse, Connections: o.Connections,
		Rate: o.Rate, Began: r.Began.UTC(), Elapsed: r.Elapsed.Seconds(), Operations: r.Operations, Failed: r.Failed,
		Errors: r.Errors, Latency: Summarize(r.Latency), Lateness: Summarize(r.Lateness), Curve: r.Curve(),
	})
}
