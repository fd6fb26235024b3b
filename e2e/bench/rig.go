package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"time"

	"github.com/imdsgate/imdsgate/e2e/lab"
)

const (
	metadata = "169.254.169.254"
	roleList = "/latest/meta-data/iam/security-credentials/"
	tokenURL = "/latest/api/token"
)

// rig is what the measurements are made with: two nodes, one of them with a daemon as it comes and two bare responders, the
// other with a daemon that has everything switched on that takes part in a decision.
type rig struct {
	settings
	dir    string
	lab    *lab.Lab
	node   *lab.Node
	warm   *lab.Pod // has a role
	denied *lab.Pod // has one that its namespace does not permit
	none   *lab.Pod // has none

	ours     target
	bare     [2]target
	policies target // of the other node
}

// target is a server, and how a pod asks it.
type target struct {
	name string
	*server
	pod  *lab.Pod
	port int // of the metadata address
}

// server is a process that answers and can be started anew.
type server struct {
	start func(context.Context) (pid int, stop func(context.Context) error, err error) // returns when it answers
	pid   int
	stop  func(context.Context) error // nil: not started yet
}

func (s *server) restart(ctx context.Context) (err error) {
	if s.stop != nil {
		if err := s.stop(ctx); err != nil {
			return err
		}
	}
	s.pid, s.stop, err = s.start(ctx)
	return err
}

// restart starts every server anew. Two equal processes were up to 6 % apart for as long as both lived.
func (r *rig) restart(ctx context.Context) error {
	for _, t := range []target{r.bare[0], r.ours, r.bare[1], r.policies} {
		if err := t.restart(ctx); err != nil {
			return fmt.Errorf("start %s: %w", t.name, err)
		}
	}
	return nil
}

// daemon is one of a node, that has answered a pod.
func (r *rig) daemon(n *lab.Node, p *lab.Pod, flags ...string) *server {
	return &server{start: func(ctx context.Context) (int, func(context.Context) error, error) {
		d, err := n.StartDaemon(ctx, flags...)
		if err != nil {
			return 0, nil, err
		}
		_, err = r.answers(ctx, p)
		return d.PID(), d.Stop, err
	}}
}

func newRig(ctx context.Context, s settings) (r *rig, err error) {
	r = &rig{settings: s}
	defer func() {
		if err != nil {
			err = errors.Join(err, r.close())
		}
	}()
	if r.dir, err = os.MkdirTemp("", "imdsgate-bench-"); err != nil {
		return nil, err
	}
	if r.load == "" {
		if r.load, err = r.build(ctx, "../..", "./cmd/imdsgate-load"); err != nil {
			return nil, err
		}
	}
	bare, err := r.build(ctx, "..", "./bench/bare")
	if err != nil {
		return nil, err
	}
	if r.lab, err = lab.Start(ctx, lab.Options{Daemon: s.daemon}); err != nil {
		return nil, err
	}
	if r.node, err = r.addNode(ctx); err != nil {
		return nil, err
	}
	if err := r.addPods(ctx); err != nil {
		return nil, err
	}
	r.ours = target{"imdsgate", r.daemon(r.node, r.warm, "-issuer", "web-identity"), r.warm, 80}
	if err := r.ours.restart(ctx); err != nil {
		return nil, err
	}
	answers, err := r.answers(ctx, r.warm)
	if err != nil {
		return nil, err
	}
	for i := range r.bare {
		s, err := r.bareServer(ctx, bare, answers, 8300+i, 81+i)
		if err != nil {
			return nil, err
		}
		r.bare[i] = target{fmt.Sprintf("bare %d", i+1), s, r.warm, 81 + i}
	}
	if err := r.addPolicies(ctx); err != nil {
		return nil, err
	}
	return r, r.restart(ctx)
}

func (r *rig) close() error {
	var errs []error
	if r.lab != nil {
		errs = append(errs, r.lab.Close())
	}
	return errors.Join(append(errs, os.RemoveAll(r.dir))...)
}

// build builds a program; from is the directory of its module, as seen from here.
func (r *rig) build(ctx context.Context, from, path string) (string, error) {
	_, file, _, _ := runtime.Caller(0)
	binary := filepath.Join(r.dir, filepath.Base(path))
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-o", binary, path)
	cmd.Dir = filepath.Join(filepath.Dir(file), from)
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build %s: %w:\n%s", path, err, out)
	}
	return binary, nil
}

func (r *rig) addNode(ctx context.Context) (*lab.Node, error) {
	n, err := r.lab.AddNode(ctx, lab.NodeOptions{IPv4Only: true})
	if err != nil {
		return nil, err
	}
	if _, err := n.Role("cart"); err != nil {
		return nil, err
	}
	return n, nil
}

// addPod adds a pod from which a thousand connections a second can be made.
func addPod(ctx context.Context, n *lab.Node, s lab.PodSpec) (*lab.Pod, error) {
	p, err := n.AddPod(ctx, s)
	if err != nil {
		return nil, err
	}
	return p, p.Net.Sysctl("net.ipv4.ip_local_port_range=1024 65000", "net.ipv4.tcp_tw_reuse=1")
}

const roleAnnotation = "eks.amazonaws.com/role-arn"

func roleARN(name string) string { return "arn:aws:iam::" + lab.Account + ":role/" + name }

func (r *rig) addPods(ctx context.Context) (err error) {
	if err := r.lab.Namespace(ctx, "closed", map[string]string{"iam.amazonaws.com/allowed-roles": "[]"}); err != nil {
		return err
	}
	for _, a := range []struct {
		pod                **lab.Pod
		namespace, account string
		annotations        map[string]string
	}{
		{&r.warm, "shop", "cart", map[string]string{roleAnnotation: roleARN("cart")}},
		{&r.denied, "closed", "cart", map[string]string{roleAnnotation: roleARN("cart")}},
		{&r.none, "shop", "none", nil},
	} {
		if err := r.lab.ServiceAccount(ctx, a.namespace, a.account, a.annotations); err != nil {
			return err
		}
		if *a.pod, err = addPod(ctx, r.node, lab.PodSpec{Namespace: a.namespace, ServiceAccount: a.account}); err != nil {
			return err
		}
	}
	return nil
}

// addPolicies makes the other node.
func (r *rig) addPolicies(ctx context.Context) error {
	n, err := r.addNode(ctx)
	if err != nil {
		return err
	}
	if err := r.lab.Namespace(ctx, "ruled", map[string]string{
		"iam.amazonaws.com/allowed-roles": `["arn:aws:iam::` + lab.Account + `:role/*"]`,
		"iam.amazonaws.com/permitted":     ".*/c[a-z]+",
	}); err != nil {
		return err
	}
	if err := r.lab.ServiceAccount(ctx, "ruled", "cart", nil); err != nil {
		return err
	}
	p, err := addPod(ctx, n, lab.PodSpec{Namespace: "ruled", ServiceAccount: "cart", Annotations: map[string]string{"iam.amazonaws.com/role": roleARN("cart")}})
	if err != nil {
		return err
	}
	s := r.daemon(n, p, "-pod-annotations", "-namespace-policy", "auto", "-session-tags", "-cluster-name", "bench")
	r.policies = target{"imdsgate, policies", s, p, 80}
	return nil
}

// answer is what the bare responder is given for a path: see package bare.
type answer struct {
	Header http.Header
	Body   []byte
}

// answers asks the daemon for all that an SDK asks for. It leaves no connection, which would count among the pod's 256.
func (r *rig) answers(ctx context.Context, p *lab.Pod) (map[string]answer, error) {
	defer p.HTTP().CloseIdleConnections()
	all := map[string]answer{}
	ask := func(method, path string, header http.Header) (answer, error) {
		req, err := http.NewRequestWithContext(ctx, method, "http://"+metadata+path, nil)
		if err != nil {
			return answer{}, err
		}
		req.Header = header
		resp, err := p.HTTP().Do(req)
		if err != nil {
			return answer{}, err
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if err == nil && resp.StatusCode != http.StatusOK {
			err = fmt.Errorf("%s %s: %s: %s", method, path, resp.Status, body)
		}
		resp.Header.Del("Date") // net/http adds it
		all[path] = answer{resp.Header, body}
		return all[path], err
	}
	token, err := ask(http.MethodPut, tokenURL, http.Header{"X-Aws-Ec2-Metadata-Token-Ttl-Seconds": {"21600"}})
	if err != nil {
		return nil, err
	}
	header := http.Header{"X-Aws-Ec2-Metadata-Token": {string(token.Body)}}
	role, err := ask(http.MethodGet, roleList, header)
	if err != nil {
		return nil, err
	}
	_, err = ask(http.MethodGet, roleList+string(role.Body), header)
	return all, err
}

// bareServer is a bare responder of the node, to which port of the metadata address leads by rules as the daemon's.
func (r *rig) bareServer(ctx context.Context, binary string, answers map[string]answer, listen, port int) (*server, error) {
	to := r.node.IP.String()
	for _, rule := range [][]string{
		{"-A", "INPUT", "-d", to, "-p", "tcp", "--dport", strconv.Itoa(listen), "-m", "conntrack", "--ctorigdst", metadata, "-j", "ACCEPT"},
		{"-A", "INPUT", "-d", to, "-p", "tcp", "--dport", strconv.Itoa(listen), "-j", "REJECT", "--reject-with", "tcp-reset"},
		{"-t", "nat", "-A", "PREROUTING", "-d", metadata, "-p", "tcp", "--dport", strconv.Itoa(port), "-j", "DNAT", "--to-destination", fmt.Sprintf("%s:%d", to, listen)},
	} {
		if _, err := r.node.Run(ctx, "iptables", append([]string{"-w"}, rule...)...); err != nil {
			return nil, err
		}
	}
	table, err := json.Marshal(answers)
	if err != nil {
		return nil, err
	}
	return &server{start: func(ctx context.Context) (int, func(context.Context) error, error) {
		ctx, kill := context.WithCancel(ctx)
		cmd := r.node.Command(ctx, binary, "-addr", fmt.Sprintf("%s:%d", to, listen))
		cmd.Stdin = bytes.NewReader(table)
		cmd.Stderr = os.Stderr
		out, err := cmd.StdoutPipe()
		if err == nil {
			err = cmd.Start()
		}
		if err != nil {
			kill()
			return 0, nil, err
		}
		stop := func(context.Context) error {
			kill()
			_ = cmd.Wait() // it was killed
			return nil
		}
		if line, err := bufio.NewReader(out).ReadString('\n'); line != "ready\n" {
			return 0, nil, errors.Join(fmt.Errorf("the bare responder did not start: %q, %w", line, err), stop(ctx))
		}
		return cmd.Process.Pid, stop, nil // it ends with this process
	}}, nil
}

// measurement is what one run of the load told.
type measurement struct {
	P50, P99 time.Duration
	CPU      time.Duration // of the answering process, per request
	Rate     float64       // operations that ended, a second
	Curve    []point
}

type point struct{ Percentile, Seconds float64 }

// ask runs imdsgate-load in the target's pod.
func (r *rig) ask(ctx context.Context, t target, l loading) (measurement, error) {
	const warmup = 100 * time.Millisecond
	args := append([]string{
		"-json", "-force", "-endpoint", fmt.Sprintf("%s:%d", metadata, t.port), "-warmup", warmup.String(), "-duration", r.length.String(),
	}, l.flags()...)
	before, err := cpuTime(t.pid)
	if err != nil {
		return measurement{}, err
	}
	out, err := t.pod.Command(ctx, r.load, args...).Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			err = fmt.Errorf("%w: %s%s", err, exit.Stderr, out)
		}
		return measurement{}, fmt.Errorf("ask %s: %w", t.name, err)
	}
	after, err := cpuTime(t.pid)
	if err != nil {
		return measurement{}, err
	}
	var result struct {
		Operations, Failed int64
		Elapsed            float64
		Errors             map[string]int64
		Latency            struct{ P50, P99 float64 }
		Curve              []point
	}
	if err := json.Unmarshal(out, &result); err != nil {
		return measurement{}, fmt.Errorf("ask %s: %w", t.name, err)
	}
	if result.Failed > 0 || result.Operations == 0 {
		return measurement{}, fmt.Errorf("ask %s: %d of %d operations failed: %v", t.name, result.Failed, result.Operations, result.Errors)
	}
	operations := l.rate * (warmup + r.length).Seconds()
	return measurement{
		P50: seconds(result.Latency.P50), P99: seconds(result.Latency.P99), Curve: result.Curve,
		CPU:  time.Duration(float64(after-before) / (operations * float64(l.requests()))),
		Rate: operations / result.Elapsed,
	}, nil
}

func seconds(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }

// loading is what the load does.
type loading struct {
	sequence    string // document or full
	imds        int
	reuse       string
	connections int
	rate        float64 // operations a second
	role        string
	want        int
}

func (l loading) flags() []string {
	flags := []string{
		"-sequence", l.sequence, "-imds", strconv.Itoa(l.imds), "-reuse", l.reuse, "-connections", strconv.Itoa(l.connections),
		"-rate", strconv.FormatFloat(l.rate, 'f', -1, 64),
	}
	if l.role != "" {
		flags = append(flags, "-role", l.role)
	}
	if l.want != 0 {
		flags = append(flags, "-want", strconv.Itoa(l.want))
	}
	return flags
}

// requests is how many requests an operation has.
func (l loading) requests() int {
	if l.sequence == "document" {
		return 1
	}
	return 1 + l.imds
}
