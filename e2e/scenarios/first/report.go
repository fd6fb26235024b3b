// Package first reports what pods got for the first request of their lives: first-request.json for programs, first-request.md
// for people and first-request.svg, a plot of both sources of identity.
package first

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"time"
)

// Sources of identity, as runs are named by.
const (
	CNI      = "CNI results"      // and the API server: the default
	Informer = "API server alone" // -cni-results=""
)

// Makers of sandboxes.
const (
	Kubelet = "real kubelets"
	Plugins = "the real CNI plugins, pods that ask at once, an API server that hears of each step up to 1.5 s late"
)

// Report is the content of first-request.json. A part that was not measured is empty.
type Report struct {
	Taken  time.Time `json:"taken"`
	Cores  int       `json:"cores"`
	Bursts []Burst   `json:"bursts"`
	Daemon []Daemon  `json:"daemon"`
	Boto3  *Burst    `json:"boto3,omitempty"`
	Reuse  []Reuse   `json:"reuse"`
}

// Burst is what pods got that were started at once, all such bursts together. Each asked once, as its first instruction, with a
// second for every request.
type Burst struct {
	Source   string         `json:"source"`
	AtOnce   int            `json:"at_once"`
	Pods     int            `json:"pods"`
	Served   int            `json:"served"` // with credentials of their own role
	Wrong    int            `json:"wrong"`  // with another pod's
	Failures map[string]int `json:"failures,omitempty"`
	// Milliseconds is how long each of the served took for its token, list and document; in ascending order.
	Milliseconds []float64 `json:"milliseconds"`
}

// Share is the served part in percent.
func (b Burst) Share() float64 { return 100 * float64(b.Served) / float64(max(b.Pods, 1)) }

// Quantile is the time within which so many of the served were, in milliseconds; 0 if none was.
func (b Burst) Quantile(q float64) float64 {
	if len(b.Milliseconds) == 0 {
		return 0
	}
	return b.Milliseconds[min(int(q*float64(len(b.Milliseconds))), len(b.Milliseconds)-1)]
}

// Daemon is what the daemons' own metrics say about a run, all nodes together.
type Daemon struct {
	Source string `json:"source"`
	// Held is the histogram of the time that requests were held until their pod was known: those alone that had to wait.
	Held Histogram `json:"held"`
	// Answers is the histogram of the time for answering a token, role list or document.
	Answers Histogram `json:"answers"`
	// ByCNI and ByAPI are the requests whose pod was told by this source.
	ByCNI float64 `json:"by_cni"`
	ByAPI float64 `json:"by_api"`
}

// Reuse is what pods got that followed each other on a few addresses.
type Reuse struct {
	Source    string         `json:"source"`
	By        string         `json:"by"` // what made the sandboxes
	Addresses int            `json:"addresses"`
	Pods      int            `json:"pods"`
	Heirs     int            `json:"heirs"`  // those that found what an earlier holder had left
	Served    int            `json:"served"` // whose first instruction got its own role
	Wrong     int            `json:"wrong"`  // answers with another pod's role, whatever was tried
	Failures  map[string]int `json:"failures,omitempty"`
	Gap       time.Duration  `json:"gap"` // median time from one holder's last request to the next one's first
	// Tried counts the answers by what was tried.
	Tried map[string]map[string]int `json:"tried"`
}

// name of the files, before the dot.
const name = "first-request"

// Write changes the report in dir, which it makes, and writes its files anew. One process at a time may do so.
func Write(dir string, change func(*Report)) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	var r Report
	b, err := os.ReadFile(filepath.Join(dir, name+".json"))
	if err == nil {
		err = json.Unmarshal(b, &r)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("read the report: %w", err)
	}
	change(&r)
	r.Taken, r.Cores = time.Now().UTC().Truncate(time.Second), runtime.NumCPU()
	if b, err = json.MarshalIndent(r, "", " "); err != nil {
		return err
	}
	svg, err := r.svg()
	if err != nil {
		return fmt.Errorf("plot: %w", err)
	}
	return errors.Join(
		os.WriteFile(filepath.Join(dir, name+".json"), append(b, '\n'), 0o644),
		os.WriteFile(filepath.Join(dir, name+".md"), r.markdown(), 0o644),
		os.WriteFile(filepath.Join(dir, name+".svg"), svg, 0o644),
	)
}

// SetBursts replaces what is known of a source.
func (r *Report) SetBursts(d Daemon, bursts []Burst) {
	r.Bursts = append(slices.DeleteFunc(r.Bursts, func(b Burst) bool { return b.Source == d.Source }), bursts...)
	r.Daemon = append(slices.DeleteFunc(r.Daemon, func(b Daemon) bool { return b.Source == d.Source }), d)
}

// SetReuse replaces what is known of a source.
func (r *Report) SetReuse(u Reuse) {
	r.Reuse = append(slices.DeleteFunc(r.Reuse, func(b Reuse) bool { return b.Source == u.Source && b.By == u.By }), u)
}

// Burst finds one; nil if it was not measured.
func (r *Report) Burst(source string, atOnce int) *Burst {
	for i, b := range r.Bursts {
		if b.Source == source && b.AtOnce == atOnce {
			return &r.Bursts[i]
		}
	}
	return nil
}
