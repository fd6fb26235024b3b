package clients

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"syscall"
	"time"
)

// fetchTimeout is when a program calls its fetch a hang. The slowest clean failure measured is
// 10 s (Go SDK v1, told to retry after 1 s); the rest is room for a busy machine.
const fetchTimeout = 20 * time.Second

// result is a program's line about one fetch.
type result struct {
	Client      string  `json:"client"`
	OK          bool    `json:"ok"`
	AccessKeyID string  `json:"access_key_id"`
	Expiration  string  `json:"expiration"`
	Seconds     float64 `json:"seconds"`
	Error       string  `json:"error"`
	ARN         string  `json:"arn"`
}

// process is a running program.
type process struct {
	cmd    *exec.Cmd
	stdin  io.WriteCloser
	out    *bufio.Scanner
	stderr bytes.Buffer
}

// start runs a program of the command line and environment that cmd has. with calls its argument on
// a thread from which the program inherits what cmd does not say; nil is any thread.
func start(cmd *exec.Cmd, with func(func() error) error) (*process, error) {
	p := &process{cmd: cmd}
	cmd.Stderr = &p.stderr
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	// A group of its own: a program that hangs may leave the client it started behind.
	cmd.SysProcAttr.Setpgid = true
	cmd.Env = append([]string{fmt.Sprintf("FETCH_TIMEOUT=%g", fetchTimeout.Seconds())}, cmd.Env...)
	var err error
	if p.stdin, err = cmd.StdinPipe(); err != nil {
		return nil, err
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	p.out = bufio.NewScanner(stdout)
	if with == nil {
		with = func(f func() error) error { return f() }
	}
	if err := with(cmd.Start); err != nil {
		return nil, fmt.Errorf("start %s: %w", cmd.Path, err)
	}
	return p, nil
}

// next returns the line about the fetch under way, and an error if the program died.
func (p *process) next() (result, error) {
	// The program watches its own fetch; this is for one that cannot even do that.
	stop := time.AfterFunc(fetchTimeout+15*time.Second, p.kill)
	defer stop.Stop()
	if !p.out.Scan() {
		return result{}, fmt.Errorf("died without a result: %w", p.wait())
	}
	var r result
	if err := json.Unmarshal(p.out.Bytes(), &r); err != nil {
		return result{}, fmt.Errorf("no result but %q: %w", p.out.Bytes(), err)
	}
	return r, nil
}

// again asks for another fetch and returns the line about it.
func (p *process) again() (result, error) {
	if _, err := io.WriteString(p.stdin, "\n"); err != nil {
		return result{}, fmt.Errorf("died before its next fetch: %w", errors.Join(err, p.wait()))
	}
	return p.next()
}

// end closes the program's stdin and returns how it ended, nil being status 0.
func (p *process) end() error {
	_ = p.stdin.Close()
	stop := time.AfterFunc(10*time.Second, p.kill)
	defer stop.Stop()
	return p.wait()
}

// kill ends the program and what it started; a program that is gone is no error.
func (p *process) kill() { _ = syscall.Kill(-p.cmd.Process.Pid, syscall.SIGKILL) }

func (p *process) wait() error {
	defer p.kill() // the rest of its group
	err := p.cmd.Wait()
	if err == nil {
		return nil
	}
	return fmt.Errorf("%w: %s", err, tail(p.stderr.Bytes()))
}

func tail(b []byte) []byte {
	b = bytes.TrimSpace(b)
	return b[max(0, len(b)-600):]
}

// hung and aborted name the two outcomes that no answer of the endpoint may cause.
func hung(err error) bool {
	var exit *exec.ExitError
	return errors.As(err, &exit) && (exit.ExitCode() == 3 || signal(exit) == syscall.SIGKILL)
}

func aborted(err error) bool {
	var exit *exec.ExitError
	return errors.As(err, &exit) && signal(exit) == syscall.SIGABRT
}

func signal(e *exec.ExitError) syscall.Signal {
	if s, ok := e.Sys().(syscall.WaitStatus); ok && s.Signaled() {
		return s.Signal()
	}
	return 0
}
