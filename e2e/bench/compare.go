package main

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/imdsgate/imdsgate/e2e/bench/report"
)

// mode is one way to ask.
type mode struct {
	name string
	loading
	turns int // of every target in a round
}

// What has a bar has more turns than what has none: one may be a fifth off, as the machine is not the same from second to second.
const (
	judged = 7
	told   = 3
)

var (
	oneConnection = mode{name: "document, 1 connection", turns: judged, loading: loading{sequence: "document", imds: 2, reuse: "keep", connections: 1, rate: 1000}}
	sixteen       = mode{name: "document, 16 connections", turns: judged, loading: loading{sequence: "document", imds: 2, reuse: "keep", connections: 16, rate: 6000}}
	fullV2        = mode{name: "v2 sequence, a connection per request", turns: judged, loading: loading{sequence: "full", imds: 2, reuse: "request", connections: 16, rate: 300}}
	refusals      = mode{name: "document, warm", turns: judged, loading: loading{sequence: "document", imds: 1, reuse: "keep", connections: 16, rate: 1200}}
)

// saturated is a load beyond what can be answered: every connection is asked again as soon as it has answered.
var saturated = mode{name: "document, 16 connections, as fast as they go", turns: judged, loading: loading{sequence: "document", imds: 2, reuse: "keep", connections: 16, rate: 100_000}}

// modes are all, the ones with bars first.
func modes() []mode {
	return []mode{
		oneConnection, sixteen, fullV2,
		{name: "document, 256 connections", turns: told, loading: loading{sequence: "document", imds: 2, reuse: "keep", connections: 256, rate: 6000}},
		{name: "v2 sequence, a connection each", turns: told, loading: loading{sequence: "full", imds: 2, reuse: "sequence", connections: 16, rate: 500}},
		{name: "v1 sequence, a connection per request", turns: told, loading: loading{sequence: "full", imds: 1, reuse: "request", connections: 16, rate: 450}},
	}
}

// series are the measurements of one target in one mode, round by round and turn by turn.
type series []measurement

// compare measures every mode of every target in each round, in short turns, so that whatever else the machine does hits all alike.
func (r *rig) compare(ctx context.Context) (report.Section, error) {
	before := busy()
	all := map[string]series{} // by mode and target
	key := func(m mode, t target) string { return m.name + "\x00" + t.name }
	refused := []struct {
		target
		role string
		want int
	}{
		{target{"imdsgate, warm", r.ours.server, r.warm, 80}, "cart", 200},
		{target{"imdsgate, denied", r.ours.server, r.denied, 80}, "cart", 403},
		{target{"imdsgate, no role", r.ours.server, r.none, 80}, "cart", 404},
	}
	targets := []target{r.bare[0], r.ours, r.bare[1], r.policies}
	measure := func(r rig, m mode, t target) error {
		got, err := r.ask(ctx, t, m.loading)
		if err != nil {
			return fmt.Errorf("%s: %w", m.name, err)
		}
		all[key(m, t)] = append(all[key(m, t)], got)
		return nil
	}
	order := []target{r.ours, r.bare[0], r.bare[1], r.policies} // what is compared is as far apart as the error bar's
	inTurn := func(r rig, m mode, round int) error {
		for turn := range m.turns {
			for i := range order {
				if turn%2 == 1 {
					i = len(order) - 1 - i // none always comes after the same one
				}
				if err := measure(r, m, order[(i+round)%len(order)]); err != nil {
					return err
				}
			}
		}
		return nil
	}
	short := *r
	short.length /= 2
	for round := range r.rounds {
		if round > 0 {
			if err := r.restart(ctx); err != nil {
				return report.Section{}, err
			}
		}
		for _, m := range modes() {
			if err := inTurn(*r, m, round); err != nil {
				return report.Section{}, err
			}
		}
		if err := inTurn(short, saturated, round); err != nil {
			return report.Section{}, err
		}
		for turn := range refusals.turns {
			for i := range refused {
				t := refused[(i+turn)%len(refused)]
				m := refusals
				m.role, m.want = t.role, t.want
				if err := measure(*r, m, t.target); err != nil {
					return report.Section{}, err
				}
			}
		}
		fmt.Printf("round %d of %d\n", round+1, r.rounds)
	}

	s := report.Section{
		ID: "compare", Title: "Against a bare responder",
		Text: comparison(r.settings, before),
	}
	of := func(m mode, t target) series { return all[key(m, t)] }
	for _, b := range []struct {
		what string
		mode
		figure
		max float64
	}{
		{"CPU per warm request, 16 connections", sixteen, cpu, 1.10},
		{"the same, as fast as they go", saturated, cpu, 1.10},
		{"p50 warm, 1 connection", oneConnection, p50, 1.05},
		{"p99 warm, 1 connection", oneConnection, p99, 1.15},
		{"v2 SDK sequence on new connections: CPU", fullV2, cpu, 1.15},
		{"v2 SDK sequence on new connections: p99", fullV2, p99, 1.15},
	} {
		reference := of(b.mode, r.bare[0])
		noise := ratios(of(b.mode, r.bare[1]), reference, b.turns, b.figure)
		s.Bars = append(s.Bars, report.Bar{
			What: b.what, Value: median(ratios(of(b.mode, r.ours), reference, b.turns, b.figure)), Max: b.max, Unit: "×",
			Noise: &report.Range{Min: noise[len(noise)/4], Max: noise[len(noise)-1-len(noise)/4]}, Note: "against the bare responder",
		})
	}
	warm := of(refusals, refused[0].target)
	for _, t := range refused[1:] {
		s.Bars = append(s.Bars, report.Bar{
			What: "CPU per request, " + strings.TrimPrefix(t.name, "imdsgate, ") + " known pod", Max: 1.2, Unit: "×",
			Value: median(ratios(of(refusals, t.target), warm, refusals.turns, cpu)), Note: "against a warm request at the same rate",
		})
	}
	for _, m := range modes() {
		table := report.Table{
			Title: fmt.Sprintf("%s, %.0f operations a second", m.name, m.rate),
			Head:  []string{"", "CPU per request", "p50", "p99", "CPU ratio", "p50 ratio", "p99 ratio"},
		}
		for _, t := range targets {
			table.Rows = append(table.Rows, row(t.name, of(m, t), of(m, r.bare[0]), m.turns))
		}
		s.Tables = append(s.Tables, table)
		s.Plots = append(s.Plots, curves(m, targets, of))
	}
	fast := report.Table{Title: saturated.name, Head: []string{"", "CPU per request", "answers a second", "CPU ratio", "answers ratio"}}
	for _, t := range targets {
		s, reference := of(saturated, t), of(saturated, r.bare[0])
		fast.Rows = append(fast.Rows, []string{t.name, micros(s.median(cpu)), fmt.Sprintf("%.0f", median(s.sorted(rate))),
			spread(ratios(s, reference, saturated.turns, cpu)), spread(ratios(s, reference, saturated.turns, rate))})
	}
	s.Tables = append(s.Tables, fast)
	table := report.Table{
		Title: fmt.Sprintf("refusals: document, 16 connections, %.0f operations a second; ratios to warm", refusals.rate),
		Head:  []string{"", "CPU per request", "p50", "p99", "CPU ratio", "p50 ratio", "p99 ratio"},
	}
	for _, t := range refused {
		table.Rows = append(table.Rows, row(t.name, of(refusals, t.target), warm, refusals.turns))
	}
	s.Tables = append(s.Tables, table)
	return s, nil
}

func comparison(s settings, load string) string {
	return fmt.Sprintf(`The daemon with a role's credentials in memory, and two processes of a bare net/http responder (no timeouts, no checks) that
answers the same paths with the same headers and bytes. All are reached from a pod by the metadata address and the same kind of
redirect; "policies" is a daemon on a second node with `+"`-pod-annotations -namespace-policy auto -session-tags`"+` and a namespace with both
kinds of policy. %d rounds, for each of which all processes are started anew; in a round the targets take %d turns of %v each, or
%d where there is no bar; those "as fast as they go" are half as long. The load is open: operations begin by the clock, and latency counts
from when each was to begin. CPU time is that of the process by its threads' schedstat; a round's is the sum of its turns, since only some
of them see a collection of garbage. A round's latencies are the medians of its turns'. Figures are medians of all turns; ratios are those
of the rounds to "bare 1", their median and range; "bare 2" is the error bar, without the highest and the lowest quarter. The machine's load average before was %s.`, s.rounds, judged, s.length, told, load)
}

// figure takes one out of a measurement.
type figure struct {
	of  func(measurement) float64
	sum bool // a round's is the sum of its turns, not their median
}

var (
	cpu  = figure{func(m measurement) float64 { return float64(m.CPU) }, true}
	p50  = figure{func(m measurement) float64 { return float64(m.P50) }, false}
	p99  = figure{func(m measurement) float64 { return float64(m.P99) }, false}
	rate = figure{func(m measurement) float64 { return m.Rate }, false}
)

// round is the ratio of the turns of a round.
func (f figure) round(a, b series) float64 {
	if f.sum {
		return f.total(a) / f.total(b)
	}
	turns := make([]float64, len(a))
	for i := range a {
		turns[i] = f.of(a[i]) / f.of(b[i])
	}
	slices.Sort(turns)
	return median(turns)
}

func (f figure) total(s series) (total float64) {
	for _, m := range s {
		total += f.of(m)
	}
	return total
}

// ratios are those of the rounds, sorted.
func ratios(a, b series, turns int, f figure) []float64 {
	var all []float64
	for first := 0; first < len(a); first += turns {
		all = append(all, f.round(a[first:first+turns], b[first:first+turns]))
	}
	slices.Sort(all)
	return all
}

// median of a sorted list.
func median(sorted []float64) float64 {
	n := len(sorted)
	return (sorted[(n-1)/2] + sorted[n/2]) / 2
}

func (s series) sorted(f figure) []float64 {
	all := make([]float64, len(s))
	for i, m := range s {
		all[i] = f.of(m)
	}
	slices.Sort(all)
	return all
}

// median of a figure that is a duration.
func (s series) median(f figure) time.Duration { return time.Duration(median(s.sorted(f))) }

func micros(d time.Duration) string { return fmt.Sprintf("%.1f µs", float64(d.Nanoseconds())/1e3) }

// spread is the median of a sorted list, with its range.
func spread(sorted []float64) string {
	return fmt.Sprintf("%.3f (%.2f – %.2f)", median(sorted), sorted[0], sorted[len(sorted)-1])
}

func row(name string, s, reference series, turns int) []string {
	cells := []string{name}
	for _, f := range []figure{cpu, p50, p99} {
		cells = append(cells, micros(s.median(f)))
	}
	for _, f := range []figure{cpu, p50, p99} {
		cells = append(cells, spread(ratios(s, reference, turns, f)))
	}
	return cells
}

// curves are the latencies by percentile, the median of the turns at each.
func curves(m mode, targets []target, of func(mode, target) series) report.Plot {
	name := strings.NewReplacer(",", "", " ", "-").Replace(m.name)
	p := report.Plot{
		Name: "latency-" + name, Title: fmt.Sprintf("%s, %.0f operations a second", m.name, m.rate),
		X: report.Axis{Label: "percentile", Percentiles: true}, Y: report.Axis{Label: "latency, ms", Log: true},
	}
	for _, t := range targets {
		line := report.Line{Name: t.name}
		s := of(m, t)
		for i, at := range s[0].Curve {
			var all []float64
			for _, got := range s {
				if i < len(got.Curve) {
					all = append(all, got.Curve[i].Seconds*1e3)
				}
			}
			slices.Sort(all)
			line.Points = append(line.Points, report.Point{X: at.Percentile, Y: median(all)})
		}
		p.Lines = append(p.Lines, line)
	}
	return p
}
