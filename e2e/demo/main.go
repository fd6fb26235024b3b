// Command demo shows what imdsgate does, with the AWS CLI in two pods of a lab: one whose service account names a role, one
// whose service account does not. Nothing it makes outlives it.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/imdsgate/imdsgate/e2e/aws"
	"github.com/imdsgate/imdsgate/e2e/imds"
	"github.com/imdsgate/imdsgate/e2e/lab"
)

// awsCLI is Debian's.
const awsCLI = "/usr/bin/aws"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Stdout)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

// demo is a lab with one node and someone who watches.
type demo struct {
	out   io.Writer
	start time.Time
	lab   *lab.Lab
	node  *lab.Node
}

func run(ctx context.Context, out io.Writer) (err error) {
	if _, err := os.Stat(awsCLI); err != nil {
		return errors.New("the AWS CLI is not installed: apt-get install -y --no-install-recommends awscli")
	}
	d := &demo{out: out, start: time.Now()}
	d.say("starting etcd, kube-apiserver and a node in network namespaces without an uplink")
	if d.lab, err = lab.Start(ctx, lab.Options{}); err != nil {
		return err
	}
	defer func() {
		d.say("removing everything")
		err = errors.Join(err, d.lab.Close())
	}()
	if d.node, err = d.lab.AddNode(ctx, lab.NodeOptions{}); err != nil {
		return err
	}
	role, err := d.node.Role("shop/cart", aws.ActionListBuckets, aws.ActionListGroups)
	if err != nil {
		return err
	}
	d.say("building and starting imdsgate: imdsgate -issuer web-identity")
	daemon, err := d.node.StartDaemon(ctx, "-issuer", "web-identity")
	if err != nil {
		return err
	}
	d.say("kubectl annotate serviceaccount -n shop cart eks.amazonaws.com/role-arn=" + role)
	if err := d.lab.ServiceAccount(ctx, "shop", "cart", map[string]string{"eks.amazonaws.com/role-arn": role}); err != nil {
		return err
	}
	with, err := d.node.AddPod(ctx, lab.PodSpec{Namespace: "shop", Name: "cart", ServiceAccount: "cart"})
	if err != nil {
		return err
	}
	without, err := d.node.AddPod(ctx, lab.PodSpec{Namespace: "shop", Name: "visitor", ServiceAccount: "visitor"})
	if err != nil {
		return err
	}

	d.title("A pod whose service account names a role")
	for _, args := range [][]string{{"s3", "ls"}, {"iam", "list-groups", "--output", "text"}} {
		if err := d.aws(ctx, with, true, args...); err != nil {
			return fmt.Errorf("%w; imdsgate wrote:\n%s", err, daemon.Log().Tail(20))
		}
	}
	d.title("A pod whose service account names none")
	for _, args := range [][]string{{"s3", "ls"}, {"iam", "list-groups", "--output", "text"}} {
		if err := d.aws(ctx, without, false, args...); err != nil {
			return fmt.Errorf("%w; imdsgate wrote:\n%s", err, daemon.Log().Tail(20))
		}
	}
	d.title("The daemon killed")
	daemon.Kill()
	if err := d.aws(ctx, without, false, "s3", "ls"); err != nil {
		return err
	}
	if err := d.node.Untouched(ctx, imds.Expected{}); err != nil {
		return err
	}
	d.say("the node's real metadata endpoint has seen no packet of either pod")
	return nil
}

// aws runs the AWS CLI in a pod and shows what it sees. listed says what should come of it.
func (d *demo) aws(ctx context.Context, p *lab.Pod, listed bool, args ...string) error {
	fmt.Fprintf(d.out, "\n%s/%s $ aws %s\n", p.Namespace, p.Name, strings.Join(args, " "))
	start := time.Now()
	out, err := p.Command(ctx, awsCLI, args...).CombinedOutput()
	for line := range strings.Lines(strings.Trim(string(out), "\n")) {
		fmt.Fprintf(d.out, "  %s\n", strings.TrimRight(line, "\n"))
	}
	fmt.Fprintf(d.out, "  (%v)\n", time.Since(start).Round(10*time.Millisecond))
	if _, failed := errors.AsType[*exec.ExitError](err); err != nil && !failed {
		return err
	}
	if refused := strings.Contains(string(out), "Unable to locate credentials"); listed != (err == nil) || listed == refused {
		return fmt.Errorf("aws %s in pod %s/%s did not end as it should: %v", strings.Join(args, " "), p.Namespace, p.Name, err)
	}
	return nil
}

func (d *demo) title(s string) { fmt.Fprintf(d.out, "\n== %s\n", s) }

func (d *demo) say(s string) {
	fmt.Fprintf(d.out, "[%4.1f s] %s\n", time.Since(d.start).Seconds(), s)
}
