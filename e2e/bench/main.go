// Command bench compares the daemon with a bare net/http responder of the same bytes, on a node of the lab: CPU time per request
// and latencies, through the same redirect, in rounds that take turns, with the responder against itself as the error bar. It
// writes a section of the report.
//
//	go run ./bench [-rounds 7] [-length 500ms] [-only compare|disturb] [-out out]
//
// It needs root, as the lab does, and says so where a processor that has other things to do will show: run nothing beside it.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/imdsgate/imdsgate/e2e/bench/report"
)

// settings are what the command line says.
type settings struct {
	rounds int
	length time.Duration // of one measurement
	out    string
	only   string
	load   string
	daemon string
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx)
	stop()
	if err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) (err error) {
	var s settings
	flag.IntVar(&s.rounds, "rounds", 7, "rounds; each compares everything, with processes of its own")
	flag.DurationVar(&s.length, "length", 500*time.Millisecond, "length of one turn")
	flag.StringVar(&s.out, "out", "out", "directory of the report")
	flag.StringVar(&s.only, "only", "", "compare or disturb; empty: both")
	flag.StringVar(&s.load, "load", "", "imdsgate-load binary; empty: built from this checkout")
	flag.StringVar(&s.daemon, "daemon", "", "imdsgate binary; empty: built from this checkout")
	flag.Parse()
	if flag.NArg() > 0 || s.rounds < 1 || s.length < 100*time.Millisecond {
		return errors.New("usage: bench [-rounds 7] [-length 500ms] [-only compare|disturb] [-out out]")
	}
	r, err := newRig(ctx, s)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.close()) }()
	for _, part := range []struct {
		name    string
		measure func(context.Context) (report.Section, error)
	}{{"compare", r.compare}, {"disturb", r.disturb}} {
		if s.only != "" && s.only != part.name {
			continue
		}
		section, err := part.measure(ctx)
		if err != nil {
			return fmt.Errorf("%s: %w", part.name, err)
		}
		if err := report.Add(s.out, section); err != nil {
			return err
		}
		for _, b := range section.Bars {
			fmt.Printf("%-60s %8.3f%s (bar %.2f) %s\n", b.What, b.Value, b.Unit, b.Max, b.Verdict())
		}
	}
	return nil
}
