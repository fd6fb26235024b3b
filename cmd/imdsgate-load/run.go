package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math"
	"net/netip"
	"os"
	"time"

	"github.com/imdsgate/imdsgate/cmd/imdsgate-load/load"
)

// More than this is no question that a person has of a cluster in use, but a test of the node: it must be meant.
const (
	politeRate        = 500 // operations a second
	politeConnections = 64
	politeDuration    = 10 * time.Minute
)

// errFailed ends with exit code 1: what failed has been printed.
var errFailed = errors.New("operations failed")

// usageError ends with exit code 2.
type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }

func exitCode(err error, stderr io.Writer) int {
	switch {
	case err == nil, errors.Is(err, flag.ErrHelp):
		return 0
	case errors.Is(err, errFailed):
		return 1
	}
	fmt.Fprintln(stderr, "imdsgate-load:", err)
	if errors.As(err, new(usageError)) {
		return 2
	}
	return 1
}

// config is what the flags say.
type config struct {
	load.Options
	operations int
	force      bool
	json       bool
	svg        string
}

const usage = `Usage: imdsgate-load [flags]

Asks the metadata endpoint for credentials at a steady rate, as AWS SDKs do, and prints how long the answers took.
Run it in a pod whose service account has a role. It never prints credentials.

Exit codes: 0 every operation succeeded, 1 some did not or none could be made, 2 wrong usage.

`

func parse(args []string, stdout io.Writer) (c config, err error) {
	f := flag.NewFlagSet("imdsgate-load", flag.ContinueOnError)
	f.SetOutput(io.Discard)
	endpoint := f.String("endpoint", "169.254.169.254:80", "address `IP:PORT` of the metadata endpoint")
	sequence := f.String("sequence", string(load.Full), "`what` one operation is: full (session token, role list, document: an SDK that starts) or document (one that refreshes)")
	reuse := f.String("reuse", string(load.PerSequence), "a connection `serves`: keep (one operation after the other), sequence (one operation) or request (one request)")
	f.IntVar(&c.Version, "imds", 2, "`version` of IMDS: 2, or 1 (without session token)")
	f.IntVar(&c.Connections, "connections", 16, "connections open at a time, at `most`")
	f.Float64Var(&c.Rate, "rate", 20, "operations a `second`, begun by the clock whether or not earlier ones were answered")
	f.DurationVar(&c.Duration, "duration", 10*time.Second, "how `long`")
	f.IntVar(&c.operations, "n", 0, "`number` of operations, instead of -duration")
	f.DurationVar(&c.Warmup, "warmup", time.Second, "`time` of the same load before, which is not counted")
	f.DurationVar(&c.Timeout, "timeout", 5*time.Second, "longest `time` of one operation")
	f.StringVar(&c.Role, "role", "", "`name` of the role to ask for; empty: the one in the role list")
	f.IntVar(&c.Want, "want", 200, "`status` that a good operation ends with: 404 in a pod without a role")
	f.BoolVar(&c.json, "json", false, "print JSON, and nothing else")
	f.StringVar(&c.svg, "svg", "", "draw the latencies by percentile into this `file`")
	f.BoolVar(&c.force, "force", false, fmt.Sprintf("permit more than %d operations a second, %d connections or %v: a test of the node, not a measurement", politeRate, politeConnections, politeDuration))
	if err := f.Parse(args); err != nil {
		if !errors.Is(err, flag.ErrHelp) {
			return c, usageError{fmt.Errorf("%w: see -help", err)}
		}
		fmt.Fprint(stdout, usage)
		f.SetOutput(stdout)
		f.PrintDefaults()
		return c, err
	}
	c.Sequence, c.Reuse = load.Sequence(*sequence), load.Reuse(*reuse)
	return c, c.validate(*endpoint, f.Args())
}

func (c *config) validate(endpoint string, rest []string) (err error) {
	if len(rest) > 0 {
		return usageError{fmt.Errorf("unexpected argument %q", rest[0])}
	}
	if c.Endpoint, err = netip.ParseAddrPort(endpoint); err != nil {
		return usageError{fmt.Errorf("-endpoint: want IP:PORT, such as 169.254.169.254:80 or [fd00:ec2::254]:80: %w", err)}
	}
	if c.operations < 0 || c.operations > 0 && !(c.Rate > 0) {
		return usageError{fmt.Errorf("-n %d -rate %v: both must be positive", c.operations, c.Rate)}
	}
	if c.operations > 0 {
		c.Duration = time.Duration(math.Ceil(float64(c.operations) / c.Rate * float64(time.Second)))
	}
	if err := c.Validate(); err != nil {
		return usageError{err}
	}
	if !c.force && (c.Rate > politeRate || c.Connections > politeConnections || c.Duration > politeDuration || c.Warmup > politeDuration) {
		return usageError{fmt.Errorf("that is a heavy load (more than %d operations a second, %d connections or %v): if you mean it, and nobody else needs the node, add -force",
			politeRate, politeConnections, politeDuration)}
	}
	return nil
}

func run(ctx context.Context, args []string, stdout io.Writer) error {
	c, err := parse(args, stdout)
	if err != nil {
		return err
	}
	if c.Want == 200 {
		s, err := ask(ctx, c.Options)
		if err != nil {
			return err
		}
		if c.Role == "" && c.Sequence == load.Document {
			c.Role = s.role
		}
		if !c.json {
			fmt.Fprintf(stdout, "role %s, credentials valid for %v\n", s.role, time.Until(s.expires).Round(time.Second))
		}
	}
	if !c.json {
		fmt.Fprintln(stdout, c.describe())
	}
	r, err := load.Run(ctx, c.Options)
	if err != nil {
		if ctx.Err() != nil {
			return errors.New("interrupted: nothing is told of a part")
		}
		return err
	}
	if c.svg != "" {
		if err := os.WriteFile(c.svg, drawing(r), 0o644); err != nil { //nolint:gosec // for everybody to look at
			return fmt.Errorf("-svg: %w", err)
		}
	}
	if c.json {
		b, err := json.MarshalIndent(r, "", "  ")
		if err != nil {
			return err
		}
		fmt.Fprintf(stdout, "%s\n", b)
	} else {
		fmt.Fprint(stdout, text(r))
	}
	if r.Failed > 0 {
		return errFailed
	}
	return nil
}
