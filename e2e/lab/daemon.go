package lab

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Region is where the lab's nodes and pods believe to be.
const Region = "us-east-1"

// daemonNamespace holds the daemons' service accounts.
const daemonNamespace = "imdsgate"

// Permissions are all that the daemon needs of the API server.
var Permissions = []rbacv1.PolicyRule{
	{APIGroups: []string{""}, Resources: []string{"pods", "serviceaccounts", "namespaces"}, Verbs: []string{"get", "list", "watch"}},
	{APIGroups: []string{""}, Resources: []string{"serviceaccounts/token"}, Verbs: []string{"create"}},
	{APIGroups: []string{""}, Resources: []string{"events"}, Verbs: []string{"create", "patch"}},
}

// SetPermissions makes the node's daemon's service account with these rules, in place of those it had, and its kubeconfig.
func (n *Node) SetPermissions(ctx context.Context, rules []rbacv1.PolicyRule) error {
	l, name := n.lab, "imdsgate-"+n.Name
	if n.account == "" {
		if err := l.ServiceAccount(ctx, daemonNamespace, name, nil); err != nil {
			return err
		}
		token, err := l.Kube.CoreV1().ServiceAccounts(daemonNamespace).CreateToken(ctx, name, &authenticationv1.TokenRequest{}, metav1.CreateOptions{})
		if err != nil {
			return fmt.Errorf("make a token for the daemon: %w", err)
		}
		if err := l.ControlPlane.writeKubeconfig(n.Kubeconfig(), token.Status.Token); err != nil {
			return err
		}
		binding := &rbacv1.ClusterRoleBinding{
			ObjectMeta: metav1.ObjectMeta{Name: name},
			RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: name},
			Subjects:   []rbacv1.Subject{{Kind: rbacv1.ServiceAccountKind, Namespace: daemonNamespace, Name: name}},
		}
		if _, err := l.Kube.RbacV1().ClusterRoleBindings().Create(ctx, binding, metav1.CreateOptions{}); err != nil {
			return err
		}
		n.account = name
	}
	role := &rbacv1.ClusterRole{ObjectMeta: metav1.ObjectMeta{Name: name}, Rules: rules}
	_, err := l.Kube.RbacV1().ClusterRoles().Create(ctx, role, metav1.CreateOptions{})
	if apierrors.IsAlreadyExists(err) {
		_, err = l.Kube.RbacV1().ClusterRoles().Update(ctx, role, metav1.UpdateOptions{})
	}
	return err
}

// Kubeconfig is the file with which the node's daemon reaches the API server.
func (n *Node) Kubeconfig() string { return filepath.Join(n.dir, "kubeconfig") }

// DaemonOptions say how a daemon is started.
type DaemonOptions struct {
	Flags []string // after the lab's own: -node and -kubeconfig
	Env   []string // beside the lab's own
	Wrap  []string // a program and arguments in front of the daemon's: setpriv, env
	// OpsPort is where the ops listener is, for a second daemon on the node; 0: 9181, the daemon's own default.
	OpsPort int
	// Bare leaves out the lab's own flags, HOST_IP and AWS_REGION.
	Bare bool
}

// Daemon is one run of the real binary on a node.
type Daemon struct {
	Node    *Node
	Options DaemonOptions
	*process
}

// StartDaemon starts imdsgate on the node and waits until it is ready.
func (n *Node) StartDaemon(ctx context.Context, flags ...string) (*Daemon, error) {
	d, err := n.LaunchDaemon(ctx, DaemonOptions{Flags: flags})
	if err != nil {
		return nil, err
	}
	return d, d.WaitReady(ctx)
}

// LaunchDaemon starts imdsgate on the node, as root, in the node's network and with its /run.
func (n *Node) LaunchDaemon(ctx context.Context, o DaemonOptions) (*Daemon, error) {
	binary, err := n.lab.daemonBinary(ctx)
	if err != nil {
		return nil, err
	}
	argv := append(slices.Clone(o.Wrap), binary)
	env := append(cleanEnv(filepath.Join(n.dir, "home")), "AWS_CA_BUNDLE="+n.lab.AWSCA, "SSL_CERT_FILE="+n.lab.AWSCA)
	if !o.Bare {
		argv = append(argv, "-node", n.Name, "-kubeconfig", n.Kubeconfig())
		env = append(env, "HOST_IP="+n.hostIP(), "AWS_REGION="+Region)
	}
	if o.OpsPort != 0 {
		argv = append(argv, "-ops-addr", fmt.Sprintf(":%d", o.OpsPort))
	}
	argv = append(argv, o.Flags...)
	cmd := n.Net.command(context.Background(), append(n.binds(), bind{n.runDir(), "/run"}), append(env, o.Env...), argv[0], argv[1:]...)
	p, err := startProcess("imdsgate", cmd, newLog())
	if err != nil {
		return nil, err
	}
	d := &Daemon{Node: n, Options: o, process: p}
	n.mu.Lock()
	n.daemons = append(n.daemons, d)
	n.mu.Unlock()
	return d, nil
}

// hostIP is the value of HOST_IP.
func (n *Node) hostIP() string {
	var s []string
	for _, ip := range n.Addrs() {
		s = append(s, ip.String())
	}
	return strings.Join(s, ",")
}

// daemonBinary builds imdsgate from this checkout, once.
func (l *Lab) daemonBinary(ctx context.Context) (string, error) {
	if l.options.Daemon != "" {
		return l.options.Daemon, nil
	}
	binary := filepath.Join(l.dir, "imdsgate")
	l.daemonOnce.Do(func() {
		_, file, _, _ := runtime.Caller(0)
		args := []string{"build", "-o", binary}
		if l.options.Race {
			args = append(args, "-race")
		}
		cmd := exec.CommandContext(ctx, "go", append(args, "./cmd/imdsgate")...)
		cmd.Dir = filepath.Join(filepath.Dir(file), "..", "..")
		if out, err := cmd.CombinedOutput(); err != nil {
			l.daemonErr = fmt.Errorf("build imdsgate: %w:\n%s", err, out)
		}
	})
	return binary, l.daemonErr
}

// WaitReady waits until /readyz says so.
func (d *Daemon) WaitReady(ctx context.Context) error {
	return d.until(ctx, "ready", func(ctx context.Context) error {
		_, err := d.Ops(ctx, "/readyz")
		return err
	})
}

// Ops asks the ops listener; an answer other than 200 is an error.
func (d *Daemon) Ops(ctx context.Context, path string) (string, error) {
	return d.get(ctx, cmp.Or(d.Options.OpsPort, 9181), path)
}

// Debug asks the debug listener.
func (d *Daemon) Debug(ctx context.Context, path string) (string, error) {
	return d.get(ctx, 9182, path)
}

func (d *Daemon) get(ctx context.Context, port int, path string) (string, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, fmt.Sprintf("http://127.0.0.1:%d%s", port, path), nil)
	if err != nil {
		return "", err
	}
	client := d.Node.Net.httpClient()
	defer client.CloseIdleConnections()
	client.Timeout = 10 * time.Second
	resp, err := client.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s says %s: %.500s", path, resp.Status, body)
	}
	return string(body), err
}

// Metrics are the samples of /metrics by name and labels as written there: name{label="value"}.
func (d *Daemon) Metrics(ctx context.Context) (map[string]float64, error) {
	text, err := d.Ops(ctx, "/metrics")
	if err != nil {
		return nil, err
	}
	samples := map[string]float64{}
	scanner := bufio.NewScanner(strings.NewReader(text))
	for scanner.Scan() {
		line := scanner.Text()
		i := strings.LastIndexByte(line, ' ')
		if strings.HasPrefix(line, "#") || i < 0 {
			continue
		}
		if v, err := strconv.ParseFloat(line[i+1:], 64); err == nil {
			samples[line[:i]] = v
		}
	}
	return samples, scanner.Err()
}

// Log is what the daemon wrote.
func (d *Daemon) Log() *Log { return d.log }

// Kill ends the daemon with SIGKILL and waits for its end.
func (d *Daemon) Kill() { d.kill() }

// Stop ends the daemon with SIGTERM and waits for its end.
func (d *Daemon) Stop(ctx context.Context) error {
	d.signal(syscall.SIGTERM)
	code, err := d.WaitExit(ctx)
	if err == nil && code != 0 {
		err = fmt.Errorf("imdsgate ended with code %d on SIGTERM:\n%s", code, d.log.Tail(15))
	}
	return err
}

// WaitExit waits until the daemon ends by itself and returns its exit code, -1 for a signal.
func (d *Daemon) WaitExit(ctx context.Context) (int, error) {
	if err := d.wait(ctx); err != nil {
		return 0, fmt.Errorf("%w:\n%s", err, d.log.Tail(15))
	}
	var exit *exec.ExitError
	if d.err != nil && !errors.As(d.err, &exit) {
		return 0, d.err
	}
	return d.cmd.ProcessState.ExitCode(), nil
}

// Again starts a new daemon with the same options, without waiting for it.
func (d *Daemon) Again(ctx context.Context) (*Daemon, error) {
	return d.Node.LaunchDaemon(ctx, d.Options)
}

// RunDaemon runs imdsgate on the node to its end, as -cleanup and -check do, and returns its exit code and what it wrote.
func (n *Node) RunDaemon(ctx context.Context, o DaemonOptions) (int, string, error) {
	d, err := n.LaunchDaemon(ctx, o)
	if err != nil {
		return 0, "", err
	}
	code, err := d.WaitExit(ctx)
	if err != nil {
		d.Kill()
	}
	return code, d.log.String(), err
}

// Events are those of the pod and of its service account, newest state.
func (p *Pod) Events(ctx context.Context) ([]corev1.Event, error) {
	list, err := p.Node.lab.Kube.CoreV1().Events(p.Namespace).List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, err
	}
	var events []corev1.Event
	for _, e := range list.Items {
		o := e.InvolvedObject
		if o.UID == p.UID || o.Kind == "ServiceAccount" && o.Name == p.ServiceAccount {
			events = append(events, e)
		}
	}
	return events, nil
}

// WaitEvent waits, up to 20 s, for an Event with the reason on the pod or its service account.
func (p *Pod) WaitEvent(ctx context.Context, reason string) (*corev1.Event, error) {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	w, err := p.Node.lab.Kube.CoreV1().Events(p.Namespace).Watch(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, err
	}
	defer w.Stop()
	for {
		events, err := p.Events(ctx)
		if err != nil {
			return nil, err
		}
		for _, e := range events {
			if e.Reason == reason {
				return &e, nil
			}
		}
		select {
		case _, ok := <-w.ResultChan():
			if !ok {
				return nil, fmt.Errorf("wait for Event %s: the watch ended", reason)
			}
		case <-ctx.Done():
			return nil, fmt.Errorf("wait for Event %s on pod %s/%s: %w; there are %d others", reason, p.Namespace, p.Name, ctx.Err(), len(events))
		}
	}
}
