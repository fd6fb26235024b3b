package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/imdsgate/imdsgate/proxy"
	"github.com/imdsgate/imdsgate/proxy/pods"
)

// surveyTime bounds the survey of a cluster: some seconds for 20,000 pods.
const surveyTime = 5 * time.Minute

// surveys says whether -check -all is about every node: it was given none, as where imdsgate is not installed yet.
func (c *Config) surveys() bool { return c.Check && c.All && c.Node == "" }

// outcome is what the move to imdsgate means for a pod.
type outcome int

const (
	changes   outcome = iota // it would not get the role that its annotation names
	gains                    // it would get a role that its annotation does not name
	keeps                    // it would get what its annotation names
	elsewhere                // it does not ask imdsgate, or asks somebody else first
	none                     // no role before or after
	outcomes
)

func (o outcome) String() string {
	return [outcomes]string{"change", "get a role from their service account or -default-role", "keep the role of their annotation", "get credentials in another way", "have no role"}[o]
}

// kind is what pods have in common that get one line together.
type kind struct {
	outcome                   outcome
	namespace, owner, account string
	named, granted            string
	hostNetwork, ownSource    bool
}

// survey prints what would become of every pod of the cluster. A pod that would lose the role that it names is a finding.
func survey(ctx context.Context, c *Config, w io.Writer) error {
	ctx, cancel := context.WithTimeout(ctx, surveyTime)
	defer cancel()
	config, err := pods.LoadConfig(c.Kubeconfig)
	if err != nil {
		return err
	}
	policy := c.Policy
	policy.Node = "node" // of session names, which are not shown
	if policy.BaseRoleARN == "auto" {
		return usageError{fmt.Errorf("-base-role-arn auto reads the instance profile of a node: without -node, name the ARN")}
	}
	all, err := pods.Survey(ctx, config, &policy)
	if err != nil {
		return err
	}
	groups := map[kind][]pods.Forecast{}
	counts := [outcomes]int{}
	for _, f := range all {
		k := kindOf(f)
		groups[k] = append(groups[k], f)
		counts[k.outcome]++
	}
	kinds := make([]kind, 0, len(groups))
	for k := range groups {
		kinds = append(kinds, k)
	}
	slices.SortFunc(kinds, func(a, b kind) int {
		return cmp.Or(cmp.Compare(a.outcome, b.outcome), cmp.Compare(a.namespace, b.namespace), cmp.Compare(a.owner, b.owner),
			cmp.Compare(a.account, b.account), cmp.Compare(a.granted, b.granted), cmp.Compare(a.named, b.named))
	})
	for _, k := range kinds {
		if k.outcome != none {
			printForecast(w, k, groups[k])
		}
	}
	fmt.Fprintf(w, "%d pods:", len(all))
	for o := range outcomes {
		sep := ","
		if o == 0 {
			sep = ""
		}
		fmt.Fprintf(w, "%s %d %s", sep, counts[o], o)
	}
	fmt.Fprintln(w)
	if counts[changes] > 0 {
		return errFindings
	}
	return nil
}

func kindOf(f pods.Forecast) kind {
	k := kind{
		namespace: f.Pod.Namespace, owner: f.Owner, account: f.Pod.ServiceAccount, named: f.Named,
		hostNetwork: f.HostNetwork, ownSource: f.OwnSource,
	}
	if f.Grant != nil {
		k.granted = f.Grant.Key.RoleARN
	}
	switch {
	case f.HostNetwork && f.Named == "", f.OwnSource:
		k.outcome = elsewhere
	case f.HostNetwork, k.named != "" && k.named != k.granted:
		k.outcome = changes
	case k.granted == "" && f.Refusal.Kind != proxy.NoRole:
		k.outcome = changes // its service account names a role that it would not get
	case k.granted == "":
		k.outcome = none
	case k.named == "":
		k.outcome = gains
	default:
		k.outcome = keeps
	}
	return k
}

func printForecast(w io.Writer, k kind, group []pods.Forecast) {
	r := report{w: w}
	first := group[0]
	count := "1 pod"
	if len(group) > 1 {
		count = fmt.Sprintf("%d pods", len(group))
	}
	fmt.Fprintf(w, "%s/%s (%s, service account %s)\n", k.namespace, k.owner, count, k.account)
	if k.named != "" {
		r.line("--", "annotation", k.named, "")
	}
	switch {
	case k.hostNetwork:
		r.line("!!", "imdsgate", "it uses the node's network (hostNetwork): it is not served, to the kernel it is the node",
			"take hostNetwork: true out of its template, or give it credentials in another way")
	case k.ownSource:
		r.line("--", "imdsgate", "its containers name another source of credentials (IRSA or EKS Pod Identity), which SDKs ask first", "")
	case first.Grant != nil && k.outcome == changes:
		r.line("!!", "imdsgate", k.granted+", by its service account, which wins", "make both annotations the same, or remove one of them")
	case first.Grant != nil:
		r.line("ok", "imdsgate", k.granted, "")
	default:
		r.line("!!", "imdsgate", "refused: "+first.Refusal.Text, first.Refusal.Fix)
	}
}
