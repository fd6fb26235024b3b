package main

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"sync/atomic"
	"time"

	"k8s.io/klog/v2"
)

func newLogger(c *Config, w io.Writer) *slog.Logger {
	log := slog.New(newHandler(c, w))
	klog.SetSlogLogger(log.With("component", "client-go"))
	return log
}

func newHandler(c *Config, w io.Writer) slog.Handler {
	o := &slog.HandlerOptions{Level: c.LogLevel}
	if c.LogFormat == "text" {
		return slog.NewTextHandler(w, o)
	}
	return slog.NewJSONHandler(w, o)
}

const (
	waitingLines = 1024        // that wait for whoever reads the log; with a full queue further ones are lost
	lastLines    = time.Second // how long the end waits for them
)

// lineQueue is written to by everybody, and read by one: a container runtime that stops reading the log must not stop the daemon,
// which writes a line when it hands out a session. It is safe for concurrent use.
type lineQueue struct {
	lines chan []byte
	lost  atomic.Int64
}

func newLineQueue() *lineQueue { return &lineQueue{lines: make(chan []byte, waitingLines)} }

// Write never blocks.
func (q *lineQueue) Write(line []byte) (int, error) {
	select {
	case q.lines <- bytes.Clone(line):
	default:
		q.lost.Add(1)
	}
	return len(line), nil
}

// run writes the lines to w until ctx is done, and then those that are left. log, which must not lead here, is told how many were
// lost.
func (q *lineQueue) run(ctx context.Context, w io.Writer, log *slog.Logger) {
	write := func(line []byte) {
		_, _ = w.Write(line) // as slog does with its own
		if n := q.lost.Swap(0); n > 0 {
			log.Error("log lines were lost: nobody read them", "lines", n)
		}
	}
	for {
		select {
		case line := <-q.lines:
			write(line)
			continue
		case <-ctx.Done():
		}
		for {
			select {
			case line := <-q.lines:
				write(line)
			default:
				return
			}
		}
	}
}

// start runs the queue until end is called, which waits for the lines that are left, for a second at most.
func (q *lineQueue) start(ctx context.Context, w io.Writer, log *slog.Logger) (end func()) {
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	done := make(chan struct{})
	go func() {
		defer close(done)
		q.run(ctx, w, log)
	}()
	return func() {
		cancel()
		select {
		case <-done:
		case <-time.After(lastLines):
		}
	}
}
