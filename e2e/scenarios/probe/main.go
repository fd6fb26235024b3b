// Command probe is what the pods of the scenarios run. It asks for credentials and writes JSON.
//
//	probe idle                     waits
//	probe once                     asks once, a second for each request; the answer is also the container's termination message
//	probe watch                    asks ten times a second and writes every answer that differs from the one before
//	probe load WORKERS INTERVAL    asks until standard input ends, then sums up
//	probe heir DIR exit|stay       see package heir; then ends, or waits
//	probe steady WORKERS INTERVAL  asks for as long as the pod lives and writes every answer
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strconv"
	"syscall"
	"time"

	"github.com/imdsgate/imdsgate/e2e/scenarios/heir"
	"github.com/imdsgate/imdsgate/e2e/scenarios/sequence"
)

// limit of each request, boto3's.
const limit = time.Second

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	err := run(ctx, os.Args[1:])
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "probe:", err)
		os.Exit(1) //nolint:forbidigo // a main of its own
	}
}

func run(ctx context.Context, args []string) error {
	// The machine that builds it may have a real metadata endpoint: this runs at its place in the image and nowhere else.
	if self, err := os.Executable(); err != nil || self != "/probe" || os.Getenv("KUBERNETES_SERVICE_HOST") == "" {
		return errors.New("this is not a pod")
	}
	out := json.NewEncoder(os.Stdout)
	switch {
	case len(args) == 1 && args[0] == "once":
		b, err := json.Marshal(sequence.Run(ctx, limit, true))
		if err != nil {
			return err
		}
		fmt.Println(string(b))
		return os.WriteFile("/dev/termination-log", b, 0o600) // it exists
	case len(args) == 1 && args[0] == "idle":
		<-ctx.Done()
		return nil
	case len(args) == 1 && args[0] == "watch":
		last := ""
		for ctx.Err() == nil {
			r := sequence.Run(ctx, limit, true)
			if brief := r.Brief(); brief != last && ctx.Err() == nil {
				last = brief
				if err := out.Encode(r); err != nil {
					return err
				}
			}
			select {
			case <-ctx.Done():
			case <-time.After(100 * time.Millisecond):
			}
		}
		return nil
	case len(args) == 3 && args[0] == "heir":
		name, err := os.Hostname()
		if err == nil {
			err = heir.Pod{Name: name, Inside: func(ask func() error) error { return ask() }}.Run(context.WithoutCancel(ctx), args[1], limit)
		}
		if err == nil && args[2] == "stay" {
			<-ctx.Done()
		}
		return err
	case len(args) == 3 && (args[0] == "load" || args[0] == "steady"):
		workers, err := strconv.Atoi(args[1])
		if err != nil {
			return err
		}
		interval, err := time.ParseDuration(args[2])
		if err != nil {
			return err
		}
		if args[0] == "steady" {
			sequence.Each(ctx, workers, interval, limit, func(r sequence.Result) {
				if e := out.Encode(r); err == nil {
					err = e
				}
			})
			return err
		}
		ctx, cancel := context.WithCancel(ctx)
		go func() {
			_, _ = io.Copy(io.Discard, os.Stdin)
			cancel()
		}()
		return out.Encode(sequence.Load(ctx, workers, interval, limit))
	}
	return fmt.Errorf("what is %q? see the source", args)
}
