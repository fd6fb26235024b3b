package sts

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws/arn"
	"github.com/aws/aws-sdk-go-v2/feature/ec2/imds"
)

// imdsTimeout bounds a question to the instance metadata endpoint: off EC2 nothing answers.
const imdsTimeout = 2 * time.Second

// region asks the instance metadata endpoint.
func (s *STS) region(ctx context.Context) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, imdsTimeout)
	defer cancel()
	out, err := s.imds.GetMetadata(ctx, &imds.GetMetadataInput{Path: "placement/region"})
	if err != nil {
		return "", err
	}
	defer out.Content.Close()
	b, err := io.ReadAll(io.LimitReader(out.Content, 64))
	if err != nil {
		return "", err
	}
	region := strings.TrimSpace(string(b))
	if region == "" {
		return "", errors.New("placement/region is empty")
	}
	return region, nil
}

// BaseRoleARN returns the prefix of the ARNs of roles in the node's account, arn:<partition>:iam::<account>:role/, as the
// node's instance profile shows it. It takes at most 2 s.
func (s *STS) BaseRoleARN(ctx context.Context) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, imdsTimeout)
	defer cancel()
	const hint = "give the node an instance profile or name the prefix, such as arn:aws:iam::123456789012:role/"
	info, err := s.imds.GetIAMInfo(ctx, &imds.GetIAMInfoInput{})
	if err != nil {
		return "", fmt.Errorf("read the instance profile: %s: %w", hint, err)
	}
	profile, err := arn.Parse(info.InstanceProfileArn)
	if err != nil || profile.Service != "iam" || profile.AccountID == "" || profile.Partition == "" {
		return "", fmt.Errorf("read the instance profile: %q is not the ARN of one: %s", info.InstanceProfileArn, hint)
	}
	return fmt.Sprintf("arn:%s:iam::%s:role/", profile.Partition, profile.AccountID), nil
}
